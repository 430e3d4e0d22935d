"""Readers on real pictures, linked into the published layouts; twins run on drawn faces.

The terms of these data sets forbid shipping them: the tests skip where they are not at hand.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from published_layouts import pts, save

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.published import write_published
from flip_jax.data.readers.celeba import CelebA
from flip_jax.data.readers.celeba_hq import CelebAMaskHQ
from flip_jax.data.readers.faces_300w import Faces300W
from flip_jax.data.readers.fs2k import Fs2k
from flip_jax.data.readers.reader import decode_mask
from flip_jax.data.records import RecordSource, load_manifest
from flip_jax.data.transforms import decode_image

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
CODES = {"train": 0, "val": 1, "test": 2}


def table(name: str) -> pa.Table:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not on this machine; its terms forbid shipping it")
    return pq.read_table(SHARED / name)


def rows(name: str) -> list[dict]:
    return table(name).to_pylist()


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def attribute_matrix(labels: pa.Table) -> np.ndarray:
    """int8 [rows, 40], 0 or 1."""
    return np.stack([labels[name].to_numpy() for name in ATTRIBUTES], 1).astype(np.int8)


def celeba_tables(root: Path, labels: pa.Table) -> None:
    """Writes CelebA's three tables of these pictures."""
    names, identities = labels["celeba_id"].to_pylist(), labels["identity"].to_pylist()
    words = np.where(attribute_matrix(labels), b"  1", b" -1")
    lines = (f"{name}{row.tobytes().decode()}\n" for name, row in zip(names, words, strict=True))
    save(root / "list_attr_celeba.txt", f"{len(names)}\n{' '.join(ATTRIBUTES)} \n{''.join(lines)}")
    codes = [CODES[split] for split in labels["official_partition"].to_pylist()]
    for file, values in (("list_eval_partition", codes), ("identity_CelebA", identities)):
        lines = (f"{name} {value}\n" for name, value in zip(names, values, strict=True))
        save(root / f"{file}.txt", "".join(lines))


def test_the_labels_of_all_of_celeba(tmp_path):
    labels = table("celeba_anno/celeba_labels_all.parquet")
    celeba_tables(tmp_path, labels)
    photos = table("real_faces/attributes.parquet")
    for name, file in zip(photos["celeba_id"], photos["file"], strict=True):
        target = SHARED / "real_faces" / "images" / file.as_py()
        link(tmp_path / "img_align_celeba" / name.as_py(), target)
    sizes, people = {}, {}
    for split in CelebA.SPLITS:
        samples = CelebA(tmp_path, split)
        wanted = labels.filter(pc.equal(labels["official_partition"], split))
        sizes[split] = len(samples)
        assert samples._names == wanted["celeba_id"].to_pylist()
        assert samples._groups == [f"celeba:{person}" for person in wanted["identity"].to_pylist()]
        np.testing.assert_array_equal(samples._attributes, attribute_matrix(wanted))
        people[split] = set(samples._groups)
        at_hand = pc.is_in(wanted["celeba_id"], photos["celeba_id"]).to_numpy()
        for number in np.flatnonzero(at_hand)[:100]:
            sample = samples[number]
            assert decode_image(sample.image).ndim == 3 and len(sample.captions) == 5
    assert sizes == {"train": 162_770, "val": 19_867, "test": 19_962}
    assert {split: len(found) for split, found in people.items()} == {
        "train": 8_192,
        "val": 985,
        "test": 1_000,
    }
    assert not people["train"] & people["val"]
    assert not people["train"] & people["test"] and not people["val"] & people["test"]


def test_celeba_photographs_become_records(tmp_path):
    sample = table("real_faces/attributes.parquet")
    sample = sample.take(list(range(0, len(sample), 20)))
    photos, root = sample.to_pylist(), tmp_path / "root"
    celeba_tables(root, sample)
    # The sample keeps CelebA's partition 0 and 2 only; one photograph plays partition 1.
    edited = (root / "list_eval_partition.txt").read_text().replace(" 0\n", " 1\n", 1)
    save(root / "list_eval_partition.txt", edited)
    for row in photos:
        target = SHARED / "real_faces" / "images" / row["file"]
        link(root / "img_align_celeba" / row["celeba_id"], target)
    report = write_published("celeba", root, tmp_path / "out", captions=2)
    assert report.written.total() == len(photos) and report.rejections == 0
    by_id = {row["celeba_id"]: row for row in photos}
    for split in load_manifest(tmp_path / "out").splits:
        for record in RecordSource(tmp_path / "out", split):
            row = by_id[record.id]
            assert record.group_id == f"celeba:{row['identity']}" and len(record.captions) == 2
            assert decode_image(record.image).shape == (row["height"], row["width"], 3)
            assert record.attributes.tolist() == [row[name] for name in ATTRIBUTES]


def test_celeba_hq_masks(tmp_path):
    """Masks taken apart into the published parts and put together again."""
    masks = [row for row in rows("parsing/parsing.parquet") if row["celeba_id_matched"]]
    labels = table("celeba_anno/celeba_labels_all.parquet")
    labels = labels.filter(pc.is_valid(labels["celebahq_index"]))
    celeba_tables(tmp_path, labels)
    names = labels["celeba_id"].to_pylist()
    numbers = dict(zip(names, labels["celebahq_index"].to_pylist(), strict=True))
    lines = (f"{number:<10}{int(name[:6]) - 1:<10}{name}\n" for name, number in numbers.items())
    mapping = "idx  orig_idx  orig_file\n" + "".join(lines)
    save(tmp_path / "CelebA-HQ-to-CelebA-mapping.txt", mapping)
    wanted = {}
    for row in masks:
        number = numbers[row["celeba_id_matched"]]
        path = SHARED / "parsing" / "masks" / row["mask"]
        wanted[number] = row, decode_mask(path.read_bytes(), path)
        link(tmp_path / "CelebA-HQ-img" / f"{number}.jpg", SHARED / "parsing/images" / row["file"])
        folder = tmp_path / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        for value, part in enumerate(CelebAMaskHQ.CLASSES):
            pixels = (wanted[number][1] == value).astype(np.uint8) * 255
            if value and pixels.any():
                encoded = cv2.imencode(".png", pixels)[1].tobytes()
                save(folder / f"{number:05d}_{part}.png", encoded)
    seen, sizes, sides = 0, {}, []
    for split in CelebAMaskHQ.SPLITS:
        samples = CelebAMaskHQ(tmp_path, split)
        sizes[split] = len(samples)
        for index, number in enumerate(samples._numbers):
            if number not in wanted:
                continue
            (row, mask), sample = wanted[number], samples[index]
            np.testing.assert_array_equal(sample.mask, mask)
            assert sample.group_id == f"celeba:{row['identity']}"
            assert decode_image(sample.image).shape[:2] == sample.mask.shape
            columns = [np.nonzero(sample.mask == value)[1] for value in (4, 5)]  # l_eye, r_eye
            if all(map(len, columns)):
                sides.append(columns[0].mean() > columns[1].mean())
            seen += 1
    assert sizes == {"train": 24_183, "val": 2_993, "test": 2_824}
    assert seen == len(masks) == 37
    assert all(sides) and len(sides) > 30  # l_ is the person's left, on the right of the picture


def test_helen_points(tmp_path):
    faces = rows("landmarks/landmarks.parquet")
    folders = {"train": "helen/trainset", "val": "helen/trainset", "test": "helen/testset"}
    points = {}
    for row in faces:
        stem = f"{folders[row['split']]}/{Path(row['file']).stem}"
        points[stem] = np.array(row["landmarks68"], np.float32).reshape(68, 2)
        link(tmp_path / f"{stem}.jpg", SHARED / "landmarks" / "images" / row["file"])
        save(tmp_path / f"{stem}.pts", pts(points[stem] + 1))
    spare = SHARED / "landmarks" / "images" / faces[0]["file"]
    for stem in ("afw/1", "lfpw/trainset/1", "lfpw/testset/1", "ibug/1"):
        link(tmp_path / f"{stem}.jpg", spare)
        save(tmp_path / f"{stem}.pts", pts(next(iter(points.values())) + 1))
    train, test = Faces300W(tmp_path, "train"), Faces300W(tmp_path, "test")
    assert (len(train), len(test)) == (670 + 2, 330 + 2)
    for sample in [*train, *test]:
        if sample.id in points:
            np.testing.assert_allclose(sample.landmarks, points[sample.id], atol=1e-5)
            eyes = sample.landmarks[36:42].mean(0), sample.landmarks[42:48].mean(0)
            assert eyes[0][0] < eyes[1][0] and sample.box[0] < eyes[0][0]
    assert decode_image(test[0].image).shape == (256, 256, 3)
    assert sum("common" in sample.subsets for sample in test) == 331


def test_fs2k_pairs(tmp_path):
    pairs = rows("sketches/pairs.parquet")
    hair = {"brown": 0, "black": 1, "red": 2, "none": 3, "golden": 4}
    for split in ("train", "test"):
        entries = []
        for row in (row for row in pairs if row["split"] == split):
            name = row["source_name"]
            drawing = name.replace("photo", "sketch").replace("image", "sketch")
            link(tmp_path / "photo" / f"{name}.jpg", SHARED / "sketches" / "photo" / row["file"])
            link(tmp_path / "sketch" / f"{drawing}.jpg", SHARED / "sketches/sketch" / row["file"])
            codes = {"gender": "male", "earring": "earring", "smile": "smile"}
            entries.append(
                {"image_name": name, "hair_color": hair[row["hair_color"]], "style": row["style"]}
                | {key: 1 - row[column] for key, column in codes.items()}
            )
        save(tmp_path / f"anno_{split}.json", json.dumps(entries))
    train, test = Fs2k(tmp_path, "train"), Fs2k(tmp_path, "test")
    assert (len(train), len(test)) == (430, 270)
    by_name = {row["source_name"]: row for row in pairs}
    for pair in [*train, *test]:
        row = by_name[pair.id]
        assert decode_image(pair.photo).shape[2] == 3
        drawing = decode_image(pair.sketch)
        assert np.median(drawing) > 128  # dark lines on a light ground
        labels = dict(zip(ATTRIBUTES, pair.attributes, strict=True))
        assert (labels["Male"], labels["Smiling"]) == (row["male"], row["smile"])
        assert labels["Wearing_Earrings"] == row["earring"]
        assert (labels["Black_Hair"] == 1) == (row["hair_color"] == "black")
