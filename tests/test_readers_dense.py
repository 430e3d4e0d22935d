"""Readers of masks, landmarks and sketches."""

import json

import numpy as np
import published_layouts as layouts
import pytest
import scipy.io

from flip_jax.data.attributes import ATTRIBUTE_INDEX
from flip_jax.data.readers import aflw
from flip_jax.data.readers.aflw import Aflw19
from flip_jax.data.readers.celeba_hq import CelebAMaskHQ
from flip_jax.data.readers.faces_300w import Faces300W
from flip_jax.data.readers.fs2k import Fs2k, Fs2kSde1, Fs2kSde2
from flip_jax.data.readers.lapa import Lapa
from flip_jax.data.readers.samples import LandmarkSample, ParsingSample, SketchPair
from flip_jax.data.readers.wflw import Wflw
from flip_jax.data.transforms import decode_image


def grey(picture: bytes) -> np.ndarray:
    return decode_image(picture)[..., 0]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- masks


def test_celeba_mask_hq_puts_the_parts_together(tmp_path):
    layouts.celeba_mask_hq(tmp_path)
    numbers = {"train": range(6, 12), "val": range(4, 6), "test": range(4)}
    for split, wanted in numbers.items():
        samples = list(CelebAMaskHQ(tmp_path, split))
        assert [sample.id for sample in samples] == [f"{number}.jpg" for number in wanted]
        for number, sample in zip(wanted, samples, strict=True):
            assert sample.mask.dtype == np.uint8
            np.testing.assert_array_equal(sample.mask, layouts.hq_mask(number))
            assert sample.image == layouts.jpeg(11 - number)
            assert sample.group_id == f"celeba:{100 + (11 - number) // 2}"
            assert len(np.unique(sample.mask)) > 5


def test_later_parts_hide_earlier_ones(tmp_path):
    """The order is the publisher's: cloth over neck over hair over skin."""
    layouts.hq_tables(tmp_path)
    folder = tmp_path / "CelebAMask-HQ-mask-anno" / "0"
    whole = np.full((4, 5), 255, np.uint8)
    for part, columns in (("cloth", 1), ("neck", 2), ("hair", 3), ("skin", 4)):
        pixels = whole.copy()
        pixels[:, columns:] = 0
        layouts.save(folder / f"00000_{part}.png", layouts.png(pixels))
    expected = [CelebAMaskHQ.CLASSES.index(name) for name in ("cloth", "neck", "hair", "skin")]
    assert CelebAMaskHQ(tmp_path, "test")[0].mask.tolist() == [[*expected, 0]] * 4


def test_two_thousand_pictures_share_a_folder(tmp_path):
    layouts.celeba_mask_hq(tmp_path)
    mapping = tmp_path / "CelebA-HQ-to-CelebA-mapping.txt"
    edit(mapping, "0         11        000012.jpg", "4001      11        000012.jpg")
    (tmp_path / "CelebA-HQ-img" / "0.jpg").rename(tmp_path / "CelebA-HQ-img" / "4001.jpg")
    for path in sorted((tmp_path / "CelebAMask-HQ-mask-anno" / "0").glob("00000_*.png")):
        target = tmp_path / "CelebAMask-HQ-mask-anno" / "2" / path.name.replace("00000", "04001")
        layouts.save(target, path.read_bytes())
    sample = CelebAMaskHQ(tmp_path, "test")[0]
    assert sample.id == "4001.jpg"
    np.testing.assert_array_equal(sample.mask, layouts.hq_mask(0))


def test_damaged_masks_of_celeba_mask_hq(tmp_path):
    layouts.celeba_mask_hq(tmp_path)
    folder = tmp_path / "CelebAMask-HQ-mask-anno" / "0"
    skin = folder / "00001_skin.png"
    samples = CelebAMaskHQ(tmp_path, "test")
    whole = skin.read_bytes()
    for content, message in (
        (whole[:60], "cannot decode"),
        (b"", "cannot decode"),
        (layouts.png(np.zeros((4, 4, 3), np.uint8)), "mode RGB"),
        (layouts.png(np.zeros((4, 4), np.uint8)), r"other parts are"),
    ):
        skin.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            samples[1]
        assert str(folder / "00001_") in str(error.value)
    for path in folder.glob("00001_*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001_\*\.png are missing"):
        samples[1]
    assert samples[2].id == "2.jpg"


def test_lapa(tmp_path):
    layouts.lapa(tmp_path)
    for split, numbers in {"train": (0, 1), "val": (2,), "test": (3, 4)}.items():
        for number, sample in zip(numbers, Lapa(tmp_path, split), strict=True):
            assert sample.id == f"{split}/{number}_{number}"
            assert sample.image == layouts.jpeg(number)
            np.testing.assert_array_equal(sample.mask, layouts.face(number).mask % 11)
            points = np.tile(layouts.face(number).landmarks, (2, 1))[:106]
            assert sample.landmarks.dtype == np.float32
            np.testing.assert_allclose(sample.landmarks, points, atol=1e-5)
    assert len(Lapa.CLASSES) == 11


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("landmarks", "68\n1 2\n", "announces 68 points and has 1, must be 106"),
        ("landmarks", "106\n" + "1 2\n" * 105, "announces 106 points and has 105"),
        ("landmarks", "106\n" + "1 x\n" * 106, "'x'"),
        ("landmarks", "106\n" + "1 nan\n" * 106, "NaN"),
        ("landmarks", "", "announces 0 points"),
        ("landmarks", b"\xff\xfe", "not a text file"),
        ("labels", b"\x89PNG", "cannot decode the mask"),
        ("labels", layouts.png(np.full((64, 64), 11, np.uint8)), "class 11, must be below 11"),
    ],
)
def test_damaged_files_of_lapa(tmp_path, part, content, message):
    layouts.lapa(tmp_path)
    path = next((tmp_path / "test" / part).glob("3_3.*"))
    layouts.save(path, content)
    samples = Lapa(tmp_path, "test")
    with pytest.raises(ValueError, match=message) as error:
        samples[0]
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing; unpack lapa again"):
        samples[0]
    assert samples[1].id == "test/4_4"


# --- landmarks


def test_300w_counts_pixels_from_0_and_has_the_full_test_set(tmp_path):
    layouts.faces_300w(tmp_path)
    train, test = list(Faces300W(tmp_path, "train")), list(Faces300W(tmp_path, "test"))
    assert [sample.id for sample in train] == [
        *("afw/1_1", "helen/trainset/2_1", "lfpw/trainset/image_0001")
    ]
    assert {sample.id: set(sample.subsets) for sample in test} == {
        "helen/testset/3_1": {"common"},
        "lfpw/testset/image_0001": {"common"},
        "ibug/image_092 _01": {"challenging"},  # a file name with a blank, as published
    }
    for number, sample in enumerate(train + test):
        points = layouts.face(number).landmarks  # the file holds them plus 1
        np.testing.assert_allclose(sample.landmarks, points, atol=1e-5)
        assert sample.box.dtype == np.float32 and sample.visible.all()
        np.testing.assert_allclose(sample.box, [*points.min(0), *points.max(0)], atol=1e-5)
        difference = decode_image(sample.image).astype(float) - layouts.face(number).image
        assert np.abs(difference).mean() < 3  # LFPW's pictures are .png, others .jpg


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_points:  68", "n_points: 67", "must be 68 after"),
        ("{\n", "{\n1 2\n", "69 points between braces"),
        ("}", "", "points between braces"),
        ("{\n", "{\nx ", "68.5 points"),
    ],
)
def test_damaged_points_of_300w(tmp_path, old, new, message):
    layouts.faces_300w(tmp_path)
    edit(tmp_path / "afw" / "1_1.pts", old, new)
    samples = Faces300W(tmp_path, "train")
    with pytest.raises(ValueError, match=message) as error:
        samples[0]
    assert "1_1.pts" in str(error.value)
    (tmp_path / "helen" / "trainset" / "2_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"helen/trainset/2_1\.jpg is missing"):
        samples[1]


def test_wflw(tmp_path):
    layouts.wflw(tmp_path)
    samples = list(Wflw(tmp_path, "test"))
    assert [sample.id for sample in samples] == [
        "test/37--Soccer/37_Soccer_1.jpg#0",
        "test/37--Soccer/37_Soccer_1.jpg#1",  # two faces of one picture
        "test/0--Parade/0_Parade_2.jpg#0",
    ]
    assert samples[0].group_id == samples[1].group_id != samples[2].group_id
    assert [set(sample.subsets) for sample in samples] == [
        set(),
        {"pose", "occlusion"},
        {"expression", "illumination", "makeup", "blur"},
    ]
    for number, sample in enumerate(samples):
        points = np.tile(layouts.face(number).landmarks, (2, 1))[:98]
        np.testing.assert_allclose(sample.landmarks, points, atol=1e-5)
        assert sample.box.tolist() == [number, 2, 40, 50]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" 1 2 40 50 ", " 1 2 40 ", "line 2: 206 words, must be 207"),
        (" 1 0 0 0 1 0 ", " 1 0 0 0 1 2 ", "line 2: attributes 1 0 0 0 1 2 must be 0 or 1"),
        (" 1 2 40 50 ", " 1 inf 40 50 ", "line 2: contains NaN or infinity"),
    ],
)
def test_damaged_list_of_wflw(tmp_path, old, new, message):
    layouts.wflw(tmp_path)
    folder = tmp_path / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    edit(folder / "list_98pt_rect_attr_train.txt", old, new)
    with pytest.raises(ValueError, match=message):
        Wflw(tmp_path, "train")


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/hostname"])
def test_tables_reach_no_file_outside_the_root(tmp_path, name):
    layouts.wflw(tmp_path / "root")
    folder = tmp_path / "root" / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    edit(folder / "list_98pt_rect_attr_train.txt", "37--Soccer/37_Soccer_1.jpg", name)
    layouts.save(tmp_path / "secret.jpg", b"secret")
    with pytest.raises(ValueError, match=f"{name} is not below {tmp_path / 'root'}"):
        Wflw(tmp_path / "root", "train")[0]


def test_aflw19(tmp_path, monkeypatch):
    monkeypatch.setattr(aflw, "_TRAIN", 4)
    layouts.aflw19(tmp_path)
    train, test = list(Aflw19(tmp_path, "train")), list(Aflw19(tmp_path, "test"))
    order = [5, 1, 0, 2, 3, 4]  # `ra` counts from 1
    files = ["0/image00.jpg", "2/image02.jpg", "3/image03.jpg", "2/image06.jpg", "3/image07.jpg"]
    assert [sample.id for sample in train + test] == [f"{files[min(n, 4)]}#{n}" for n in order]
    for number, sample in zip(order, train + test, strict=True):
        np.testing.assert_array_equal(sample.landmarks, layouts.face(number).landmarks[:19])
        assert sample.box.tolist() == [number, 2, 40, 50]  # left, right, top, bottom there
        assert np.flatnonzero(~sample.visible).tolist() == ([5] if number in (0, 3) else [])
    assert [set(sample.subsets) for sample in train] == [set()] * 4
    assert [set(sample.subsets) for sample in test] == [set(), {"frontal"}]


def test_damaged_tables_of_aflw19(tmp_path):
    layouts.aflw19(tmp_path)
    path = tmp_path / "AFLWinfo_release.mat"
    table = {name: value for name, value in scipy.io.loadmat(path).items() if name[0] != "_"}
    for change, message in (
        ({"ra": np.array([[1, 2, 3, 4, 5, 5]])}, "ra is not a permutation of the 6 faces"),
        ({"data": table["data"][:, :36]}, "bbox, data and mask_new are"),
    ):
        scipy.io.savemat(path, table | change)
        with pytest.raises(ValueError, match=message):
            Aflw19(tmp_path, "train")
    del table["mask_new"]
    scipy.io.savemat(path, table)
    with pytest.raises(ValueError, match="no variable 'mask_new'"):
        Aflw19(tmp_path, "train")


# --- sketches


def test_fs2k(tmp_path):
    layouts.fs2k(tmp_path)
    pairs = [*Fs2k(tmp_path, "train"), *Fs2k(tmp_path, "test")]
    assert [pair.id for pair in pairs] == layouts.FS2K["train"] + layouts.FS2K["test"]
    for number, pair in enumerate(pairs):
        assert pair.photo == layouts.jpeg(number) and pair.style == number % 3 and pair.steps == ()
        # photo2's sketch is a .png, the others are .jpg.
        assert pair.sketch.startswith(b"\x89PNG" if number == 2 else b"\xff\xd8\xff")
        drawing = grey(pair.sketch).astype(float)
        assert np.abs(drawing - layouts.sketch(number)).mean() < 10
        for name in ("Male", "Smiling", "Wearing_Earrings"):  # 0 is yes in the file
            index = ATTRIBUTE_INDEX[name]
            assert pair.attributes[index] == layouts.face(number).attributes[index]
    colours = [ATTRIBUTE_INDEX[name] for name in ("Brown_Hair", "Black_Hair", "Blond_Hair")]
    assert [pair.attributes[colours].tolist() for pair in pairs] == [
        *([1, 0, 0], [0, 1, 0], [0, 0, 0], [-1, -1, -1], [0, 0, 1], [1, 0, 0])
    ]
    known = np.flatnonzero(pairs[0].attributes != -1)
    assert len(known) == 6  # all others are unknown


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gender", 2, r"gender of photo1/image0003 is 2, must be 0\.\.1"),
        ("style", 3, r"style of photo1/image0003 is 3, must be 0\.\.2"),
        ("hair_color", None, r"hair_color of photo1/image0003 is None, must be 0\.\.4"),
        ("image_name", "../../secret", "image_name '../../secret' must be like photo1/image0110"),
    ],
)
def test_damaged_annotation_of_fs2k(tmp_path, key, value, message):
    layouts.fs2k(tmp_path)
    path = tmp_path / "anno_train.json"
    entries = json.loads(path.read_text())
    entries[0][key] = value
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        Fs2k(tmp_path, "train")
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"anno_train\.json is not a JSON file"):
        Fs2k(tmp_path, "train")


def test_fs2k_sde(tmp_path):
    layouts.fs2k_sde(tmp_path)
    names = {
        split: [[pair.id for pair in reader(tmp_path, split)] for reader in (Fs2kSde1, Fs2kSde2)]
        for split in ("train", "test")
    }
    assert names == {  # its own split: FS2K has image0002 in test and image0017 in train
        "train": [["photo1/image0002", "photo1/image0003"], ["photo3/image0161"]],
        "test": [["photo1/image0017"], ["photo3/image0154"]],
    }
    pair = Fs2kSde1(tmp_path, "train")[0]
    assert len(pair.steps) == 11 and pair.photo == layouts.jpeg(3)
    ink = [(grey(step) < 128).sum() for step in pair.steps]
    assert ink == sorted(ink) and ink[0] < ink[-1]  # 10.png comes after 9.png
    np.testing.assert_array_equal(grey(pair.steps[-1]), layouts.sketch(2))


def test_fs2k_sde_names_what_does_not_fit(tmp_path):
    layouts.fs2k_sde(tmp_path)
    folder = tmp_path / "dataset1" / "sketch" / "train"
    for path in (folder / "sketch0002").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="sketch0002 is empty; unpack fs2k_sde1 again"):
        Fs2kSde1(tmp_path, "train")[0]
    (folder / "sketch0002").rename(folder / "sketch0999")
    with pytest.raises(ValueError, match="sketch0999: FS2K has no picture 999 in photo1"):
        Fs2kSde1(tmp_path, "train")


# --- the samples themselves


def test_samples_of_the_wrong_kind_are_refused():
    good = {
        "landmarks": np.zeros((68, 2), np.float32),
        "box": np.zeros(4, np.float32),
        "visible": np.ones(68, bool),
        "subsets": frozenset(),
    }
    LandmarkSample("a", "b", b"", **good)
    for field, value, message in (
        ("landmarks", np.zeros((68, 3), np.float32), r"is float32\[68, 3\], must be .*'any', 2\]"),
        ("landmarks", np.zeros((68, 2)), "is float64"),
        ("box", np.full(4, np.nan, np.float32), "contains NaN"),
        ("visible", np.ones(67, bool), r"is bool\[67\], must be bool\[68\]"),
    ):
        with pytest.raises(ValueError, match=f"sample 'a': {field} {message}"):
            LandmarkSample("a", "b", b"", **(good | {field: value}))
    with pytest.raises(ValueError, match="mask is uint8"):
        ParsingSample("a", "b", b"", np.zeros((2, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="attributes is int8"):
        SketchPair("a", "b", b"", b"", np.zeros(39, np.int8), 0)
