"""TFDS builders: samples go through ArrayRecord files and back, without TensorFlow."""

import io
import pickle
import sys

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image

from flip_jax.data.readers import READERS, aflw
from flip_jax.data.readers.url_tables import face_caption_batches
from flip_jax.data.records import RecordSource
from flip_jax.data.transforms import decode_image


@pytest.fixture
def tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    import flip_jax.data.tfds  # noqa: F401  (registers the builders)

    return tfds


def build(tfds, name, root, data_dir):
    """Writes the data set; returns its builder."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=root)
    builder.download_and_prepare(download_config=config)
    return builder


def source(tfds, name, split, data_dir):
    """Samples whose pictures stay as they are stored."""
    kept = dict.fromkeys(("image", "mask", "photo", "sketch"), tfds.decode.SkipDecoding())
    features = tfds.builder(name, data_dir=data_dir).info.features
    decoders = {key: decoder for key, decoder in kept.items() if key in features}
    return tfds.data_source(name, split=split, data_dir=data_dir, decoders=decoders)


def plain(value):
    """What TFDS gives, as a reader gives it."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value.decode() if isinstance(value, bytes) else value


@pytest.mark.parametrize("name", sorted(READERS))
def test_samples_come_back_in_order(tfds, tmp_path, monkeypatch, name):
    monkeypatch.setattr(aflw, "_TRAIN", 4)
    if name == "lfwa":
        pytest.importorskip("h5py")
    root, data_dir = tmp_path / "root", tmp_path / "data"
    layouts.LAYOUTS[name](root)
    builder = build(tfds, f"flip_{name}", root, data_dir)
    assert set(builder.info.splits) == set(READERS[name].SPLITS)
    for split in READERS[name].SPLITS:
        samples = READERS[name](root, split)
        found = source(tfds, f"flip_{name}", split, data_dir)
        assert len(found) == len(samples)
        for sample, example in zip(samples, found, strict=True):
            for field, value in example.items():
                compare(field, getattr(sample, field), value)
    assert not {module for module in sys.modules if module.split(".")[0] == "tensorflow"}


def compare(field, wanted, found):
    if field == "mask":
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found))), wanted)
    elif field == "steps":
        assert len(found) == len(wanted)
        for step, picture in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(picture, decode_image(step))
    elif isinstance(wanted, bytes):  # a picture, byte for byte
        assert found == wanted
    elif wanted is None:
        assert len(found) == 0
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    elif isinstance(wanted, frozenset):
        assert plain(list(found)) == sorted(wanted)
    else:
        assert plain(found) == wanted


def test_a_data_source_decodes_and_feeds_workers(tfds, tmp_path):
    import grain

    layouts.celeba_mask_hq(tmp_path / "root")
    build(tfds, "flip_celeba_mask_hq", tmp_path / "root", tmp_path / "data")
    found = tfds.data_source("flip_celeba_mask_hq", split="train", data_dir=tmp_path / "data")
    copy = pickle.loads(pickle.dumps(found))
    sample = READERS["celeba_mask_hq"](tmp_path / "root", "train")[2]
    for example in (found[2], copy[2], grain.MapDataset.source(found)[2]):
        assert example["image"].shape == (layouts.SIDE, layouts.SIDE, 3)
        np.testing.assert_array_equal(example["mask"][..., 0], sample.mask)


def test_records(tfds, tmp_path):
    from flip_jax.data.__main__ import main

    folder = tmp_path / "drawn"
    options = "--train-identities 3 --test-identities 2 --pictures 1 --size 64 --processes 1"
    assert main(["draw", "--out", str(folder), *options.split()]) == 0
    build(tfds, "flip_records", folder, tmp_path / "data")
    for split in ("train", "test"):
        found = source(tfds, "flip_records", split, tmp_path / "data")
        for record, example in zip(RecordSource(folder, split), found, strict=True):
            for field, value in example.items():
                compare(field, getattr(record, field), value)


@pytest.mark.parametrize("name", ["face_caption", "laion_face"])
def test_tables_without_pictures(tfds, tmp_path, name):
    getattr(layouts, name)(tmp_path / "root")
    build(tfds, f"flip_{name}", tmp_path / "root", tmp_path / "data")
    found = tfds.data_source(f"flip_{name}", split="train", data_dir=tmp_path / "data")
    assert len(found) == 6
    if name == "laion_face":
        assert found[0]["alt_text"] == b"a face" and found[1]["alt_text"] == b""
        return
    rows = [row for batch in face_caption_batches(tmp_path / "root") for row in batch.to_pylist()]
    for row, example in zip(rows, found, strict=True):
        assert example["box"].tolist() == (row.pop("box") or [])
        assert {key: example[key].decode() or None for key in row} == row


def test_what_is_missing_is_named(tfds, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "unrelated.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"train/images is missing\. lapa is read from"):
        build(tfds, "flip_lapa", tmp_path / "root", tmp_path / "data")
    builder = tfds.builder("flip_lapa", data_dir=tmp_path / "data")
    assert READERS["lapa"].SOURCE in type(builder).MANUAL_DOWNLOAD_INSTRUCTIONS
    assert "masks of 11 classes" in builder.info.description


def test_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for name in ("flip_jax.data.tfds", "flip_jax.data.tfds.builders"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'flip_jax\[tfds\]'"):
        import flip_jax.data.tfds  # noqa: F401
