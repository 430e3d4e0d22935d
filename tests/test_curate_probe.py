"""Labels of the project's own probe, from a saved folder to the records of a build."""

import json
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from tiny_run import CFG

from flip_jax.curate.attributes import AttributeStage, labels_from_probabilities
from flip_jax.curate.config import (
    AttributesConfig,
    CurateConfig,
    FacesConfig,
    InputConfig,
    OutputConfig,
    SplitConfig,
)
from flip_jax.curate.pipeline import build
from flip_jax.curate.stages import Sample, Tally
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.records import RecordSource
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.data.transforms import decode_image, encode_jpeg
from flip_jax.downstream.attribute_head import init_head
from flip_jax.downstream.attributes import load_probe
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.probe import save_probe
from flip_jax.models import flip

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "face"]


def save(folder, seed=0):
    """A probe of random weights, large enough for certain answers."""
    params = flip.init_params(CFG.model, CFG.loss.temperature, jax.random.key(seed))
    backbone = Backbone(jax.device_get(params), CFG, Tokenizer(WORDS, 8), {"name": "random"})
    head = init_head("flip", 3 * (len(backbone.blocks) + 1), 32, 40, jax.random.key(seed + 1))
    head["linear"]["kernel"] *= 12
    save_probe(folder, backbone, "flip", head, {"pictures": 0})
    return str(folder)


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("run") / "probe")


def stage(folder, **fields):
    found = AttributeStage(AttributesConfig(labeller="probe", model=folder, **fields))
    found = pickle.loads(pickle.dumps(found))
    found.setup()
    return pickle.loads(pickle.dumps(found))  # also one that is loaded goes to a worker


def test_a_build_with_the_labels_of_a_probe(probe, tmp_path):
    (tmp_path / "photos").mkdir()
    for person in range(20):
        face = draw_face(seed=0, identity=person, picture=0, size=96)
        Image.fromarray(face.image).save(tmp_path / f"photos/{person:02}.png")
    cfg = CurateConfig(
        input=InputConfig(kind="folder", paths=str(tmp_path / "photos"), chunk_rows=11),
        faces=FacesConfig(detector="whole", min_side=64),
        attributes=AttributesConfig(labeller="probe", model=probe),
        split=SplitConfig(train=1.0, val=0.0, test=0.0),
        output=OutputConfig(path=str(tmp_path / "data")),
    )
    counts = build(cfg)
    source = RecordSource(tmp_path / "data", "train")
    records = [source[number] for number in range(len(source))]
    assert len(records) >= 10
    assert counts["attributes/out"] == len(records) < 21
    chances = load_probe(probe).probabilities([record.image for record in records])
    # Those at the limit may fall on either side with other pictures beside them.
    safe = np.abs(np.abs(chances - 0.5) - 0.35) > 1e-5
    labels = np.array([record.attributes for record in records])
    wanted = labels_from_probabilities(chances, 0.85)
    np.testing.assert_array_equal(labels[safe], wanted[safe])
    assert {-1, 0, 1} <= set(labels.ravel().tolist())
    assert ((labels == 1).sum(axis=1) > 5).all()


def test_what_is_said_of_a_picture_does_not_depend_on_the_others(probe):
    faces = [encode_jpeg(draw_face(0, person, 0, 64).image) for person in range(9)]
    samples = [Sample(str(number), image=face) for number, face in enumerate(faces)]
    some = stage(probe, min_labels=-1, batch_size=4)
    some.setup()
    together = [each.probabilities for each in some.process(samples, Tally())]
    for number, sample in enumerate(samples):
        (alone,) = some.process([sample], Tally())
        np.testing.assert_array_equal(alone.probabilities, together[number])
    wanted = load_probe(probe).probabilities([decode_image(face) for face in faces])
    np.testing.assert_allclose(together, wanted, atol=1e-5)
    assert np.ptp(wanted, axis=0).max() > 0.1


def test_folders_that_are_no_probes(probe, tmp_path):
    with pytest.raises(ValueError, match=r"attributes.model='none' holds no probe.json"):
        AttributeStage(AttributesConfig(labeller="probe", model="none"))
    copy = tmp_path / "probe"
    other = AttributeStage(AttributesConfig(labeller="probe", model=save(copy, seed=5)))
    same = AttributeStage(AttributesConfig(labeller="probe", model=probe)).fingerprint()
    assert stage(probe).fingerprint() == same != other.fingerprint()
    about = (copy / "probe.json").read_text()
    swapped = json.loads(about)
    swapped["attributes"][:2] = swapped["attributes"][1::-1]
    (copy / "probe.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"knows Arched_Eyebrows, .*CelebA in their order"):
        stage(str(copy))
    (copy / "probe.json").write_text(about)
    (copy / "arrays.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"config.attributes.model=.*arrays.npz is missing or not"):
        stage(str(copy))
