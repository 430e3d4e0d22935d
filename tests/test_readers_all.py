"""What holds for the reader of every published data set."""

import pickle
import shutil

import numpy as np
import pytest
from published_layouts import LAYOUTS

from flip_jax.data.readers import READERS, aflw
from flip_jax.data.readers.samples import LandmarkSample, ParsingSample, SketchPair
from flip_jax.data.records import Record


@pytest.fixture(params=sorted(READERS))
def published(request, tmp_path, monkeypatch):
    """(reader, folder with a tiny data set in its layout)."""
    monkeypatch.setattr(aflw, "_TRAIN", 4)
    if request.param == "lfwa":
        pytest.importorskip("h5py")
    LAYOUTS[request.param](tmp_path / "root")
    return READERS[request.param], tmp_path / "root"


def arrays(sample) -> dict[str, np.ndarray]:
    fields = sample.__struct_fields__ if isinstance(sample, Record) else vars(sample)
    values = {name: getattr(sample, name) for name in fields}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def test_every_layout_has_a_reader():
    assert set(LAYOUTS) == set(READERS)


def test_samples_have_their_type_and_their_own_id(published):
    reader, root = published
    ids = []
    for split in reader.SPLITS:
        samples = reader(root, split)
        assert len(list(samples)) == len(samples) > 0
        for sample in samples:
            assert type(sample) is reader.SAMPLE
            ids.append(sample.id)
            if isinstance(sample, Record | ParsingSample | LandmarkSample):
                assert sample.image.startswith((b"\xff\xd8\xff", b"\x89PNG"))
            if isinstance(sample, LandmarkSample | SketchPair):
                assert arrays(sample)
    assert len(set(ids)) == len(ids)


def test_a_reader_can_be_sent_to_another_process(published):
    reader, root = published
    samples = reader(root, "train")
    copies = pickle.loads(pickle.dumps(samples))
    assert len(copies) == len(samples)
    for sample, copy in zip(samples, copies, strict=True):
        assert sample.id == copy.id
        for name, value in arrays(sample).items():
            np.testing.assert_array_equal(value, getattr(copy, name))


def test_bounds_and_splits(published):
    reader, root = published
    samples = reader(root, "train")
    for index in (-1, len(samples)):
        with pytest.raises(IndexError, match=rf"sample {index} of {len(samples)}"):
            samples[index]
    with pytest.raises(ValueError, match=rf"{reader.NAME} has no split 'dev'; it has train"):
        reader(root, "dev")


def test_each_missing_part_is_named_with_what_to_download(published, tmp_path):
    reader, root = published
    paths = [path for split in reader.SPLITS for path in reader(root, split).tables]
    paths += [path for path in root.iterdir() if path.is_dir()]
    for part in sorted({path.relative_to(root) for path in paths}):
        if "landmarks_align" in part.name or "bbox" in part.name:
            continue  # may be absent
        if (reader.NAME, part.name) in (("fs2k_sde1", "dataset2"), ("fs2k_sde2", "dataset1")):
            continue  # the other part of FS2K-SDE
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(root, tmp_path / "copy")
        gone = tmp_path / "copy" / part
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.raises(FileNotFoundError) as error:
            for split in reader.SPLITS:
                reader(tmp_path / "copy", split)
        assert part.name in str(error.value)
        assert reader.SOURCE in str(error.value) and "Nothing is downloaded" in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        reader(tmp_path / "nowhere", "train")
