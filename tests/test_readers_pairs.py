"""Readers of pictures with labels and captions: the CelebA family, LFW and LFWA."""

import json
import pickle
import sys

import numpy as np
import published_layouts as layouts
import pytest

from flip_jax.data.attributes import ATTRIBUTE_INDEX
from flip_jax.data.captions import captions
from flip_jax.data.readers import READERS
from flip_jax.data.readers.celeba import CelebA, CelebADialog, CelebAInTheWild, Face2Text
from flip_jax.data.readers.celeba_hq import CelebADialogHQ, MMCelebAHQ
from flip_jax.data.readers.lfw import Lfw, Lfwa
from flip_jax.data.records import group_number


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def groups(reader, root):
    return [{sample.group_id for sample in reader(root, split)} for split in reader.SPLITS]


# --- CelebA


@pytest.mark.parametrize("folders", [{}, {"Anno": "Anno", "Eval": "Eval", "Img": "Img"}])
def test_celeba(tmp_path, folders):
    layouts.celeba(tmp_path, folders)
    number = 0
    for split, size in {"train": 6, "val": 2, "test": 4}.items():
        samples = CelebA(tmp_path, split, captions=3)
        assert len(samples) == size
        for sample in samples:
            assert sample.id == f"{number + 1:06d}.jpg"
            assert sample.group_id == f"celeba:{100 + number // 2}"
            assert sample.image == layouts.jpeg(number)
            assert sample.attributes.dtype == np.int8
            np.testing.assert_array_equal(sample.attributes, layouts.face(number).attributes)
            assert sample.landmarks.dtype == np.float32
            np.testing.assert_array_equal(sample.landmarks, layouts.five_points(number))
            assert sample.box is None  # the file describes the pictures before alignment
            # `build` draws the same captions for a picture of this name.
            seed = group_number(f"0:{sample.id}")
            assert sample.captions == captions(sample.attributes, seed, 3)
            number += 1
    assert number == len(layouts.PARTITION)


def test_celeba_splits_share_no_person(tmp_path):
    layouts.celeba(tmp_path)
    train, val, test = groups(CelebA, tmp_path)
    assert not train & val and not train & test and not val & test


def test_celeba_points_may_be_left_out(tmp_path):
    layouts.celeba(tmp_path)
    (tmp_path / "list_landmarks_align_celeba.txt").unlink()
    assert CelebA(tmp_path, "val", captions=0)[0].landmarks is None
    assert CelebA(tmp_path, "val", captions=0)[0].captions == []


def test_celeba_in_the_wild_has_boxes(tmp_path):
    layouts.celeba_in_the_wild(tmp_path)
    first, second = list(CelebAInTheWild(tmp_path, "train"))[:2]
    assert first.box is None  # 0 0 0 0 in the file
    assert second.box.dtype == np.float32 and second.box.tolist() == [1, 2, 31, 42]
    assert second.landmarks is None


def test_a_missing_picture_is_named_when_it_is_asked_for(tmp_path):
    layouts.celeba(tmp_path)
    (tmp_path / "img_align_celeba" / "000002.jpg").unlink()
    samples = CelebA(tmp_path, "train")
    assert samples[0].id == "000001.jpg"
    with pytest.raises(FileNotFoundError, match=r"000002\.jpg is missing; unpack celeba again"):
        samples[1]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("list_attr_celeba.txt", "12\n", "13\n", "has 12 rows and says it has 13"),
        ("list_attr_celeba.txt", " Bald ", " Bold ", "must begin with .* Bald .* begins with '12'"),
        ("list_attr_celeba.txt", "12\n", "", "it begins with '5_o_Clock_Shadow'"),
        ("list_attr_celeba.txt", "000003.jpg", "000003.jpg  1", "line 5: 41 values, not 40"),
        ("list_attr_celeba.txt", "000003.jpg -1", "000003.jpg  0", "label 0 of 000003.jpg"),
        ("list_attr_celeba.txt", "000003.jpg -1", "000003.jpg x", "line 5: .*'x'"),
        ("list_attr_celeba.txt", "000003.jpg", "000099.jpg", "no row for 000003.jpg"),
        ("list_eval_partition.txt", "000003.jpg 0", "000003.jpg 3", "partition '3' of 000003.jpg"),
        ("list_eval_partition.txt", "000003.jpg 0", "000003.jpg", "line 3: 1 words"),
        ("identity_CelebA.txt", "000003.jpg", "000099.jpg", "no row for 000003.jpg"),
        ("list_landmarks_align_celeba.txt", "lefteye_x", "lefteye", "must begin with"),
    ],
)
def test_damaged_tables_of_celeba(tmp_path, file, old, new, message):
    layouts.celeba(tmp_path)
    edit(tmp_path / file, old, new)
    with pytest.raises(ValueError, match=message) as error:
        CelebA(tmp_path, "train")
    assert str(tmp_path / file) in str(error.value)


def test_a_table_that_is_no_text(tmp_path):
    layouts.celeba(tmp_path)
    (tmp_path / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"list_attr_celeba\.txt is not a text file"):
        CelebA(tmp_path, "train")


# --- captions on CelebA


def test_celeba_dialog(tmp_path):
    layouts.celeba_dialog(tmp_path)
    ids = [sample.id for sample in CelebADialog(tmp_path, "train")]
    # 3 is not in CelebA-Dialog.
    assert ids == ["000001.jpg", "000002.jpg", "000004.jpg", "000005.jpg", "000006.jpg"]
    test = list(CelebADialog(tmp_path, "test"))
    assert [sample.captions for sample in test] == [
        [f"Face {number:06d}.jpg is here."]
        for number in (9, 10, 11)  # 12 has no caption
    ]
    np.testing.assert_array_equal(test[0].attributes, layouts.face(8).attributes)
    train, val, test = groups(CelebADialog, tmp_path)
    assert not train & val and not train & test and not val & test


def test_face2text(tmp_path):
    layouts.face2text(tmp_path)
    train = list(Face2Text(tmp_path, "train"))
    assert [sample.id for sample in train] == [f"{n:06d}.jpg" for n in (1, 3, 4, 5)]
    assert train[2].captions == ["Description 0 of 3.", "Description 1 of 3."]
    np.testing.assert_array_equal(train[2].attributes, layouts.face(3).attributes)
    assert [sample.id for sample in Face2Text(tmp_path, "val")] == ["000002.jpg"]
    # Its split divides pictures, not people; the docstring warns of that.
    train, val, _ = groups(Face2Text, tmp_path)
    assert train & val == {"celeba:100"}


def test_face2text_takes_lists_of_descriptions(tmp_path):
    layouts.face2text(tmp_path)
    entries = [{"filename": "000001.jpg", "description": ["One.", " ", "Two."]}]
    (tmp_path / "clean_train_2.1.json").write_text(json.dumps(entries))
    assert Face2Text(tmp_path, "train")[0].captions == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("celeba_dialog", "text/captions.json"),
        ("celeba_dialog_hq", "captions_hq.json"),
        ("face2text", "clean_train_2.1.json"),
    ],
)
@pytest.mark.parametrize("content", ['{"000001.jpg": ', "[3]", '"text"'])
def test_damaged_captions(tmp_path, name, file, content):
    layouts.LAYOUTS[name](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} is not"):
        READERS[name](tmp_path, "train")


# --- CelebA-HQ


def test_celeba_dialog_hq(tmp_path):
    layouts.celeba_dialog_hq(tmp_path)
    train = list(CelebADialogHQ(tmp_path, "train"))
    # CelebA-HQ's 6 to 11 are CelebA's 5 to 0, of its training set; 11 has no caption.
    assert [sample.id for sample in train] == [f"{n}.jpg" for n in range(6, 11)]
    assert train[0].captions == ["Face 6.jpg is here."]
    for sample, original in zip(train, (5, 4, 3, 2, 1), strict=True):
        assert sample.group_id == f"celeba:{100 + original // 2}"
        assert sample.image == layouts.jpeg(original)
        np.testing.assert_array_equal(sample.attributes, layouts.face(original).attributes)
    train, val, test = groups(CelebADialogHQ, tmp_path)
    assert not train & val and not train & test and not val & test


def test_mm_celeba_hq(tmp_path):
    layouts.mm_celeba_hq(tmp_path)
    test = list(MMCelebAHQ(tmp_path, "test"))
    assert [sample.id for sample in test] == ["9.jpg", "10.jpg", "11.jpg"]
    assert test[0].captions == [f"This person 9 has text {line}." for line in range(10)]
    assert len(MMCelebAHQ(tmp_path, "train")) == 9
    (tmp_path / "text" / "celeba-caption" / "10.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"celeba-caption/10\.txt is missing"):
        MMCelebAHQ(tmp_path, "test")[1]


class Malicious:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_a_pickle_is_not_trusted(tmp_path, capsys):
    layouts.mm_celeba_hq(tmp_path)
    path = tmp_path / "train" / "filenames.pickle"
    for content in (pickle.dumps([Malicious()]), b"no pickle", b"", pickle.dumps(["a face"])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"filenames\.pickle is not a list of picture names"):
            MMCelebAHQ(tmp_path, "train")
    assert "must not run" not in capsys.readouterr().out


def test_damaged_mapping(tmp_path):
    layouts.celeba_dialog_hq(tmp_path)
    path = tmp_path / "CelebA-HQ-to-CelebA-mapping.txt"
    edit(path, "000010.jpg", "")
    with pytest.raises(ValueError, match=r"mapping\.txt line 4: must be idx, orig_idx and orig"):
        CelebADialogHQ(tmp_path, "train")


# --- LFW


def test_lfw(tmp_path):
    layouts.lfw(tmp_path)
    train, test = list(Lfw(tmp_path, "train")), list(Lfw(tmp_path, "test"))
    files = layouts.lfw_files()
    assert [sample.id for sample in train + test] == files
    for number, sample in enumerate(train + test):
        assert sample.image == layouts.jpeg(number)
        assert sample.group_id == "lfw:" + files[number].split("/")[0]
        assert sample.captions == [] and (sample.attributes == -1).all()
    train, test = groups(Lfw, tmp_path)
    assert not train & test


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2\n", "3\n", "has 2 people and says it has 3"),
        ("\t2", "", "line 2: must be name and"),
        ("2\nAnn_Lee\t2\nBo_Chan\t1\n", "", "has 0 people and says it has nothing"),
    ],
)
def test_damaged_list_of_people(tmp_path, old, new, message):
    layouts.lfw(tmp_path)
    edit(tmp_path / "peopleDevTrain.txt", old, new)
    with pytest.raises(ValueError, match=message):
        Lfw(tmp_path, "train")


def test_lfwa(tmp_path):
    pytest.importorskip("h5py")
    layouts.lfwa(tmp_path)
    train, test = list(Lfwa(tmp_path, "train", captions=2)), list(Lfwa(tmp_path, "test"))
    files = layouts.lfw_files()
    # The published rows count from 1.
    assert [sample.id for sample in train] == [files[n] for n in (0, 1, 3, 4, 5)]
    assert [sample.id for sample in test] == [files[n] for n in (2, 6, 7)]
    for sample in train + test:
        number = files.index(sample.id)
        assert sample.image == layouts.jpeg(number)
        np.testing.assert_array_equal(sample.attributes, layouts.face(number).attributes)
    assert len(train[0].captions) == 2 and len(test[0].captions) == 5
    assert train[0].attributes[ATTRIBUTE_INDEX["Young"]] in (0, 1)


def test_lfwa_does_not_train_on_its_test_set(tmp_path):
    pytest.importorskip("h5py")
    layouts.lfwa(tmp_path / "good")
    train, test = groups(Lfwa, tmp_path / "good")
    assert train and test and not train & test
    # The same pictures on both sides, and other pictures of the same people.
    for name, rows in {"equal": (3, 7, 8), "same person": (1, 2, 7)}.items():
        layouts.lfwa(tmp_path / name, train=rows)
        for split in Lfwa.SPLITS:
            with pytest.raises(ValueError, match=r"people such as lfw:.* are in train and test"):
                Lfwa(tmp_path / name, split)


def test_damaged_tables_of_lfwa(tmp_path):
    pytest.importorskip("h5py")
    layouts.lfwa(tmp_path / "range", train=(0, 1))
    with pytest.raises(ValueError, match=r"indices_img_train holds 0, must be 1\.\.8"):
        Lfwa(tmp_path / "range", "train")
    root = tmp_path / "labels"
    layouts.lfwa(root)
    names = [file.replace("/", "\\") for file in layouts.lfw_files()]
    for labels, message in ((np.full((8, 40), 2), "labels must be 0 or 1"), (np.ones((8, 2)), "")):
        texts = {"name": names, "AttrName": list(ATTRIBUTE_INDEX)}
        layouts.save_mat73(root / "lfw_att_40.mat", {"label": labels}, texts)
        with pytest.raises(ValueError, match=rf"lfw_att_40\.mat: {message}"):
            Lfwa(root, "train")
    for content in (b"MATLAB 7.3 MAT-file, cut off", b"", b"MATLAB 5.0 MAT-file"):
        (root / "lfw_att_40.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"lfw_att_40\.mat cannot be read"):
            Lfwa(root, "train")


def test_lfwa_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    layouts.lfw_files(tmp_path / "lfw")
    (tmp_path / "lfw_att_40.mat").write_bytes(b"MATLAB 7.3 MAT-file")
    with pytest.raises(ImportError, match=r"pip install 'flip_jax\[lfwa\]'"):
        Lfwa(tmp_path, "train")
