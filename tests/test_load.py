"""`flip_jax.load`: from a run, a checkpoint, an export, the hub; pictures and texts of any kind."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_weights
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

import flip_jax
from flip_jax import config
from flip_jax.checkpoint import Checkpointer, read_meta, save_weights
from flip_jax.config import Config, DataConfig, LossConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.data.transforms import BadImage, encode_jpeg, resize_image
from flip_jax.models import flip
from flip_jax.weights import Weights, read_tokenizer, read_weights, write_export

TEXTS = ["a young woman", "an old man with a beard and a hat", "Smiling!"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, params, workdir of a run that saved step 7)"""
    model = tiny_weights.model_config()
    cfg = Config(model=model, data=DataConfig(tokenizer="grammar"), loss=LossConfig(queue_size=16))
    params = jax.jit(lambda: flip.init_params(model, 0.07, jax.random.key(0)))()
    state = {
        "step": jnp.asarray(7, jnp.int32),
        "params": params,
        "opt_state": {"count": jnp.zeros((), jnp.int32)},
        "momentum": flip.twin_params(params),
        "queue": flip.init_queue(16, model.embed_dim, jax.random.key(1)),
    }
    tokenizer = Tokenizer.load("grammar", model.text.max_length)
    meta = {
        "config": config.to_dict(cfg),
        "vocab_hash": tokenizer.vocab_hash,
        "data_hash": "none",
    }
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir, cfg.checkpoint, meta) as checkpointer:
        checkpointer.save(7, state)
    return cfg, params, workdir


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "flip"
    weights = read_weights(run[2])
    write_export(folder, weights, read_tokenizer(run[2], weights))
    return folder


@pytest.fixture(scope="module")
def model(run):
    return flip_jax.load(run[2], batch_size=4)


@pytest.fixture(scope="module")
def pictures():
    return list(np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), dtype=np.uint8))


def test_outputs_are_those_of_the_model(run, model, pictures):
    cfg, params, _ = run
    whole = nnx.merge(flip.build(dataclasses.replace(cfg.model, dtype="float32")), params)
    images = jnp.asarray(model.preprocess(pictures))
    tokens, embed = whole.encode_image(images)
    ids, mask = model.tokenizer(TEXTS)
    np.testing.assert_allclose(model.encode_image(pictures), embed, atol=2e-6)
    np.testing.assert_allclose(model.encode_text(TEXTS), whole.encode_text(ids, mask)[1], atol=2e-6)
    logits = whole.match(jnp.asarray(ids), jnp.asarray(mask), tokens[:3])
    probability = jax.nn.softmax(logits)[:, 1]
    np.testing.assert_allclose(model.match(pictures[:3], TEXTS), probability, atol=2e-6)
    assert model.step == 7 and model.cfg == cfg
    for found in (model.encode_image(pictures), model.encode_text(TEXTS)):
        assert type(found) is np.ndarray and found.dtype == np.float32


def test_one_picture_for_all_texts(model, pictures):
    texts = [*TEXTS, *TEXTS]
    np.testing.assert_allclose(
        model.match(pictures[0], texts), model.match([pictures[0]] * 6, texts), atol=2e-6
    )


def test_every_way_to_load_gives_the_same(run, export, model, monkeypatch, tmp_path):
    workdir, wanted = run[2], model.encode_text(TEXTS)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(export))
    monkeypatch.chdir(tmp_path)
    for path in (workdir / "checkpoints", workdir / "checkpoints/7", export, "owner/flip"):
        np.testing.assert_array_equal(flip_jax.load(path).encode_text(TEXTS), wanted)


def test_bfloat16_is_near(run, model):
    found = flip_jax.load(run[2], dtype="bfloat16").encode_text(TEXTS)
    assert found.dtype == np.float32
    difference = np.abs(found - model.encode_text(TEXTS)).max()
    assert 0 < difference < 0.05


def test_results_do_not_depend_on_the_batch(model, pictures):
    together = model.encode_image(pictures)
    alone = np.concatenate([model.encode_image(picture) for picture in pictures])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_nothing_in_nothing_out(model):
    size = tiny_weights.SIZE
    assert model.preprocess([]).shape == (0, size, size, 3)
    assert model.encode_image([]).shape == (0, 24)
    assert model.encode_text([]).shape == (0, 24)
    assert model.match([], []).shape == (0,)


def test_pictures_of_every_kind(model, tmp_path):
    picture = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    memory = io.BytesIO()
    Image.fromarray(picture).save(memory, "PNG")
    wanted = resize_image(picture, tiny_weights.SIZE)[None]
    kinds = (
        picture,
        picture[None],
        Image.fromarray(picture),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        memory.getvalue(),
        [tmp_path / "a.png"],
    )
    for kind in kinds:
        np.testing.assert_array_equal(model.preprocess(kind), wanted)
    jpeg = model.preprocess(encode_jpeg(picture, quality=100))
    assert np.abs(jpeg.astype(int) - wanted).mean() < 3
    grey = model.preprocess(Image.fromarray(picture).convert("L"))
    assert np.all(grey[..., 0] == grey[..., 1])
    turned = Image.fromarray(picture)
    turned.getexif()[0x0112] = 3  # upside down
    upright = resize_image(np.ascontiguousarray(picture[::-1, ::-1]), tiny_weights.SIZE)
    np.testing.assert_array_equal(model.preprocess(turned)[0], upright)


def test_bad_pictures_and_texts_are_refused(model, pictures, tmp_path):
    with pytest.raises(BadImage, match="picture 1: "):
        model.preprocess([pictures[0], b"no picture"])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for bad in (tmp_path / "bad.png", str(tmp_path / "bad.png")):
        with pytest.raises(BadImage, match=r"/bad\.png: "):
            model.encode_image([pictures[0], bad])
    for mode in ("I;16", "I", "F"):
        with pytest.raises(BadImage, match=f"picture 0: .*mode {mode}"):
            model.preprocess(Image.new(mode, (40, 50)))
    with pytest.raises(FileNotFoundError):
        model.preprocess(tmp_path / "absent.png")
    for wrong in (pictures[0].astype(np.float32), pictures[0][..., 0], np.zeros((4, 4, 4), "u1")):
        with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
            model.encode_image([wrong])
    with pytest.raises(ValueError, match="one string"):
        model.encode_text("a young woman")
    with pytest.raises(ValueError, match="2 pictures and 3 texts"):
        model.match(pictures[:2], TEXTS)


def test_pictures_are_decoded_batch_by_batch(model, pictures, tmp_path, monkeypatch):
    """A file of the second batch is not opened before the first batch ran."""
    run, ran, opened_after = model._image, [], []

    class Watched(os.PathLike):
        def __init__(self, index):
            self.path = str(tmp_path / f"{index}.png")
            Image.fromarray(pictures[index]).save(self.path)

        def __fspath__(self):
            opened_after.append(len(ran))
            return self.path

    files = [Watched(index) for index in range(6)]
    monkeypatch.setattr(model, "_image", lambda *arrays: ran.append(1) or run(*arrays))
    model.encode_image(files)
    model.match(files, [*TEXTS, *TEXTS])
    assert opened_after == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2


def test_bad_options_are_refused(run):
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        flip_jax.load(run[2], dtype="float16")
    with pytest.raises(ValueError, match="batch_size is 0"):
        flip_jax.load(run[2], batch_size=0)


def test_another_vocabulary_is_refused(run, export, tmp_path):
    entries = (export / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*entries[:9], entries[10], entries[9]]))
    with pytest.raises(ValueError, match="trained with the vocabulary"):
        flip_jax.load(run[2], tokenizer=str(tmp_path / "vocab.txt"))
    assert flip_jax.load(run[2], tokenizer=str(export)).tokenizer.vocab_size == tiny_weights.VOCAB


def test_a_tower_alone_is_refused(run, tmp_path):
    meta = {n: read_meta(run[2])[n] for n in ("config", "vocab_hash", "data_hash")}
    save_weights(tmp_path / "tower", {"vit": run[1]["vit"]}, meta)
    with pytest.raises(ValueError, match="not a whole model") as error:
        flip_jax.load(tmp_path / "tower")
    assert "missing bert/word_embed" in str(error.value)


def test_folders_of_others_and_other_versions_are_refused(export, tmp_path):
    with pytest.raises(FileNotFoundError, match="complete checkpoint"):
        flip_jax.load(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(export, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"layout_version": 99}))
    with pytest.raises(ValueError, match="layout version 99"):
        flip_jax.load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="no flip_jax export"):
        flip_jax.load(folder)


def test_damaged_exports_are_refused(export, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(export, folder)
    described = json.loads((folder / "config.json").read_text())
    for field in ("layout_version", "step", "vocab_hash", "config"):
        rest = {name: value for name, value in described.items() if name != field}
        (folder / "config.json").write_text(json.dumps(rest))
        with pytest.raises(ValueError, match=f"config.json lacks {field}; .*export it again"):
            flip_jax.load(folder)
    (folder / "config.json").write_text(json.dumps(described))
    whole = (folder / "model.safetensors").read_bytes()
    for content in (b"", b"<!DOCTYPE html>", whole[: len(whole) // 2]):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(OSError, match=r"model.safetensors is damaged.*export it again"):
            flip_jax.load(folder)


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        flip_jax.load(tmp_path / "absent")

    def offline(name, **_):
        raise FileNotFoundError("LocalEntryNotFoundError")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(OSError, match="without a network"):
        flip_jax.load("owner/absent")


def test_the_hub_client_offline(tmp_path):
    """The real client: without network and cache it is one clear error."""
    script = "import flip_jax; flip_jax.load('owner/absent')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
    )
    assert "OSError: 'owner/absent' is no local path" in done.stderr


def test_importing_the_package_starts_no_jax():
    script = "import sys, flip_jax; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "Config is None, not a table of fields"),
        ({"vision": 3}, "VisionConfig is 3, not a table of fields"),
        ({"vocab_size": "529"}, "config.model.text.vocab_size='529': must be int"),
        ({"patch_size": 0}, "config.model.vision.patch_size=0: must be at least 1"),
        ({"dtype": "float7"}, "config.model.dtype='float7': must be"),
        ({"heads": 7}, "heads=7: must divide"),
        ({"max_length": 1000}, "config.model.text.max_length=1000: must be 3.."),
    ],
)
def test_an_edited_config_is_named(export, tmp_path, change, message):
    shutil.copytree(export, tmp_path / "edited")
    ((name, value),) = change.items()

    def edited(node):
        if not isinstance(node, dict):
            return node
        return {key: value if key == name else edited(part) for key, part in node.items()}

    file = tmp_path / "edited" / "config.json"
    file.write_text(json.dumps(edited(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_weights(tmp_path / "edited")
    assert "edited" in str(caught.value)


def test_a_name_that_is_a_group_too(export, tmp_path):
    shutil.copytree(export, tmp_path / "edited")
    file = tmp_path / "edited" / "model.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"vit": np.zeros(1, np.float32)}, file)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*vit"):
        read_weights(tmp_path / "edited")


def test_export_keeps_every_bit(run, export):
    wanted, found = read_weights(run[2]), read_weights(export)
    assert isinstance(found, Weights) and found.cfg == wanted.cfg
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
