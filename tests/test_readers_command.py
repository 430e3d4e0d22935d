"""Records of published data sets: `python -m flip_jax.data read`."""

import io
import re
import shlex
from pathlib import Path

import numpy as np
import published_layouts as layouts
import pytest
from PIL import Image, ImageOps

from flip_jax.data.__main__ import main
from flip_jax.data.published import write_published
from flip_jax.data.readers import READERS, aflw
from flip_jax.data.readers.celeba_hq import CelebAMaskHQ
from flip_jax.data.readers.samples import SketchPair
from flip_jax.data.records import RecordSource, load_manifest
from flip_jax.data.transforms import decode_image

PAGE = Path(__file__).parent.parent / "docs" / "datasets.md"


def read(name, root, out, *options) -> int:
    return main(["read", name, "--root", str(root), "--out", str(out), *options])


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_data_set_becomes_records(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(aflw, "_TRAIN", 4)
    if name == "lfwa":
        pytest.importorskip("h5py")
    root, out, reader = tmp_path / "root", tmp_path / "out", READERS[name]
    layouts.LAYOUTS[name](root)
    assert read(name, root, out) == 0
    printed = capsys.readouterr().out
    assert "0 rows rejected" in printed
    for split in reader.SPLITS:
        samples, records = reader(root, split), RecordSource(out, split)
        assert records.damaged_shards() == []
        for sample, record in zip(samples, records, strict=True):
            assert (record.id, record.group_id) == (sample.id, sample.group_id)
            is_pair = isinstance(sample, SketchPair)
            picture = sample.photo if is_pair else sample.image
            if picture.startswith(b"\xff\xd8"):
                assert record.image == picture
            if is_pair:
                assert record.drawings == list(sample.steps or [sample.sketch])
                assert len(record.captions) == 5
            else:
                assert record.drawings == []
            for field in ("captions", "attributes", "box", "landmarks"):
                wanted, found = getattr(sample, field, None), getattr(record, field)
                if wanted is None:
                    assert found is None or field in ("captions", "attributes")
                else:
                    np.testing.assert_array_equal(found, wanted)
            assert record.subsets == sorted(getattr(sample, "subsets", ()))
            visible = getattr(sample, "visible", None)
            if visible is None or visible.all():
                assert record.visible is None
            else:
                np.testing.assert_array_equal(record.visible, visible)
    shared = load_manifest(out).groups_in_several_splits
    assert (shared > 0) == (name in ("face2text", "mm_celeba_hq", "wflw", "aflw19"))
    assert ("WARNING" in printed) == (shared > 0)
    tables = {path.name for split in reader.SPLITS for path in reader(root, split).tables}
    assert all(f"{table} sha256" in load_manifest(out).source for table in tables)


def test_captions(tmp_path, capsys):
    layouts.celeba(tmp_path / "celeba")
    assert read("celeba", tmp_path / "celeba", tmp_path / "a", "--captions", "2") == 0
    assert read("celeba", tmp_path / "celeba", tmp_path / "b", "--threads", "1") == 0
    two, five = RecordSource(tmp_path / "a", "val"), RecordSource(tmp_path / "b", "val")
    for few, many in zip(two, five, strict=True):
        assert few.captions == many.captions[:2] and len(many.captions) == 5
    assert "captions=2" in capsys.readouterr().out


def test_the_mask_of_a_record_has_the_pixels_of_its_picture(tmp_path):
    layouts.celeba_mask_hq(tmp_path / "root")
    write_published("celeba_mask_hq", tmp_path / "root", tmp_path / "out")
    for sample, record in zip(
        CelebAMaskHQ(tmp_path / "root", "test"), RecordSource(tmp_path / "out", "test"), strict=True
    ):
        mask = np.asarray(Image.open(io.BytesIO(record.mask)))
        np.testing.assert_array_equal(mask, np.kron(sample.mask, np.ones((2, 2), np.uint8)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["wflw", "lapa"])
def test_what_is_measured_in_pixels_of_the_file_stays_in_its_place(tmp_path, name, orientation):
    """A camera's turn is not applied where points or a mask go by the pixels as they are stored."""
    layouts.LAYOUTS[name](tmp_path / "root")
    write_published(name, tmp_path / "root", tmp_path / "plain")
    for path in (tmp_path / "root").rglob("*.jpg"):
        path.write_bytes(with_orientation(path.read_bytes(), orientation))
    write_published(name, tmp_path / "root", tmp_path / "turned")
    plain, turned = (RecordSource(tmp_path / out, "test") for out in ("plain", "turned"))
    for one, other in zip(plain, turned, strict=True):
        first, second = (decode_image(record.image).astype(int) for record in (one, other))
        assert first.shape == second.shape and np.abs(first - second).mean() < 3
        np.testing.assert_array_equal(one.landmarks, other.landmarks)
        assert one.mask == other.mask


def with_orientation(data: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


@pytest.mark.parametrize("orientation", [3, 6])
def test_pictures_alone_are_turned_upright(tmp_path, orientation):
    layouts.mm_celeba_hq(tmp_path / "root")
    for path in (tmp_path / "root").rglob("*.jpg"):
        path.write_bytes(with_orientation(path.read_bytes(), orientation))
    reader = READERS["mm_celeba_hq"](tmp_path / "root", "test")
    write_published("mm_celeba_hq", tmp_path / "root", tmp_path / "out")
    for sample, record in zip(reader, RecordSource(tmp_path / "out", "test"), strict=True):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(sample.image)))
        stored = np.asarray(Image.open(io.BytesIO(record.image))).astype(int)
        assert np.abs(stored - np.asarray(upright)).mean() < 3


def test_a_damaged_sketch_is_named(tmp_path):
    root = tmp_path / "root"
    layouts.fs2k_sde(root)
    (root / "dataset1" / "sketch" / "train" / "sketch0002" / "4.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="undecodable picture: 1\n    photo1/image0002"):
        write_published("fs2k_sde1", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_samples_are_named(tmp_path, capsys):
    root = tmp_path / "root"
    layouts.lapa(root)
    images, labels = root / "train" / "images", root / "test" / "labels"
    (images / "0_0.jpg").write_bytes(layouts.jpeg(0)[:-40])
    (labels / "3_3.png").write_bytes(b"no picture")
    (root / "test" / "landmarks" / "4_4.txt").unlink()
    assert read("lapa", root, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert "3 of 5 rows were rejected, allowed share 0.01; nothing was written" in printed
    assert not (tmp_path / "out").exists()
    assert read("lapa", root, tmp_path / "out", "--max-bad-fraction", "0.6") == 0
    printed = capsys.readouterr().out
    assert "2 records (1 train, 1 val), 0 pictures encoded again, 3 rows rejected" in printed
    assert "undecodable picture: 1\n    train/0_0: damaged JPEG" in printed
    assert f"damaged file: 1\n    {labels / '3_3.png'}: cannot decode the mask" in printed
    points = root / "test" / "landmarks" / "4_4.txt"
    assert f"unreadable file: 1\n    {points} is missing" in printed


def test_what_cannot_be_read(tmp_path, capsys):
    assert read("celeba", tmp_path, tmp_path / "out") == 2
    assert "img_align_celeba is missing. celeba is read from" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # argparse names the choices
        read("imagenet", tmp_path, tmp_path / "out")
    assert "300w" in capsys.readouterr().err
    with pytest.raises(ValueError, match="data set 'imagenet' is not known; allowed: celeba"):
        write_published("imagenet", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threads=0", "threads=0: must be at least 1"),
        ("--captions=-1", "captions=-1: must be at least 0"),
        ("--max-bad-fraction=nan", "max_bad_fraction=nan: must be from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_a_file_is_read(tmp_path, capsys, option, message):
    assert read("celeba", tmp_path / "none", tmp_path / "out", option) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.chdir(tmp_path)
    downloads = tmp_path / "downloads"
    layouts.celeba(downloads / "celeba")
    layouts.lapa(downloads / "lapa")
    layouts.face_caption(downloads / "FaceCaption-15M")
    layouts.laion_face(downloads / "laion_face_meta")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for language, text in blocks:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            continue
        for line in text.splitlines():
            assert main(shlex.split(line)[3:]) == 0, line
    printed = capsys.readouterr().out
    assert "celeba: schema" in printed and "000007.jpg (celeba:103)" in printed
    assert "2 test/3_3 (64, 64) ['background'" in printed and "(106, 2)" in printed
    assert "https://a.example/0.jpg [1.0, 2.0, 30.0, 40.0]" in printed and "\n6\n" in printed
    assert "2 b'000007.jpg' (64, 64, 3)" in printed


def test_the_page_names_every_data_set():
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.M)))
    assert set(READERS) <= set(named)
