"""Which sketches grow how, and which of them is to find which photo."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_downstream

from flip_jax.data.drawn_faces import draw_face, draw_sketch
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, RecordSource
from flip_jax.data.sketch_strokes import grow_raster, grow_strokes, level_paper
from flip_jax.data.transforms import decode_image, encode_jpeg
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.slfir_sketches import PartialSketches, SketchFaces, pair_rows

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "sketches"
SIDE = 64


def png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", picture)[1].tobytes()


def face_record(number: int, **fields) -> Record:
    face = draw_face(1, number, 0, SIDE)
    given = {
        "id": f"face{number}",
        "group_id": f"person{number}",
        "image": encode_jpeg(face.image),
        "captions": ["a face"],
        "attributes": face.attributes,
    }
    return Record(**given | fields)


def sketch(number: int) -> np.ndarray:
    return draw_sketch(draw_face(1, number, 0, SIDE).strokes, SIDE)


def faces_of(folder: Path, records: list[Record], image_size: int = SIDE) -> Faces:
    with RecordWriter(folder, "test") as writer:
        for record in records:
            writer.write("test", record)
    return FaceData(folder, image_size).split("test")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """12 people, two pictures each; all first pictures come before the second ones."""
    folder = tmp_path_factory.mktemp("sketches") / "drawn"
    return FaceData(tiny_downstream.write_faces(folder), 32).split("test")


def test_strokes_of_drawn_faces(drawn):
    sketches = SketchFaces(drawn, steps=9)
    assert (len(sketches), sketches.left_out, sketches.origins) == (24, 0, {"strokes": 24})
    record = drawn.record(5)
    grown = sketches.grown(5)
    assert grown.shape == (9, 32, 32, 3) and grown.dtype == np.uint8
    wanted = grow_strokes(record.strokes, decode_image(record.image).shape[:2], 9, 32)
    np.testing.assert_array_equal(grown, np.repeat(wanted[..., None], 3, axis=3))
    assert (np.diff(grown.astype(int), axis=0) <= 0).all() and grown[-1].min() < 100


def test_a_hand_is_off_the_same_way_each_time(drawn):
    exact, off = SketchFaces(drawn, 4), SketchFaces(drawn, 4, hand=1.0)
    for row in (0, 1):
        assert (off.grown(row) != exact.grown(row)).any()
        np.testing.assert_array_equal(off.grown(row), SketchFaces(drawn, 4, hand=1.0).grown(row))
    chosen = np.ones((24, 1), np.int32)
    keys = [PartialSketches(sketches, chosen).key() for sketches in (exact, off)]
    assert keys[0] != keys[1]  # or a cache would mix them up


def test_pictures_of_each_person(drawn):
    one = SketchFaces(drawn, 3, per_person=1)
    assert len(one) == 12 and len(set(one.faces.group_ids)) == 12
    assert one.faces.ids == drawn.ids[:12] and one.left_out == 0
    assert len(SketchFaces(drawn, 3, per_person=2)) == 24


def test_drawings_of_pixels(tmp_path):
    whole = sketch(0)
    steps = [np.where(np.arange(SIDE)[:, None] < 9 * n, sketch(1), 255) for n in range(1, 8)]
    steps = [step.astype(np.uint8) for step in steps]
    records = [
        face_record(0, drawings=[png(whole)]),
        face_record(1, drawings=[png(step) for step in steps]),
        face_record(2),
        face_record(3, drawings=[png(sketch(3))], captions=[]),
    ]
    sketches = SketchFaces(faces_of(tmp_path / "data", records), steps=3)
    assert sketches.faces.ids == ["face0", "face1"] and sketches.left_out == 2
    assert sketches.origins == {"raster": 1, "steps": 1}
    np.testing.assert_array_equal(sketches.grown(0)[..., 0], grow_raster(whole, 3))
    # Three of seven steps: the first that has a third, two thirds, all of them.
    np.testing.assert_array_equal(sketches.grown(1)[..., 2], [steps[2], steps[4], steps[6]])


def test_a_sketch_that_cannot_be_read_is_named(tmp_path):
    records = [
        face_record(0, drawings=[png(np.full((SIDE, SIDE), 255, np.uint8))]),
        face_record(1, drawings=[b"no picture"]),
    ]
    sketches = SketchFaces(faces_of(tmp_path / "data", records), steps=3)
    with pytest.raises(ValueError, match="sketch of face0: the sketch is blank"):
        sketches.grown(0)
    with pytest.raises(ValueError, match="sketch of face1: a drawing is no picture"):
        sketches.grown(1)


def test_faces_without_sketches(tmp_path):
    faces = faces_of(tmp_path / "data", [face_record(0), face_record(1)])
    with pytest.raises(DataLacks, match=r"none of 2 records has a sketch and a caption.*fs2k"):
        SketchFaces(faces, steps=3)


def test_some_steps(drawn):
    sketches = SketchFaces(drawn, steps=50)
    chosen = sketches.some_steps(10, seed=0)
    assert chosen.shape == (24, 10) and (np.diff(chosen, axis=1) > 0).all()
    # One from each tenth, and not always the same one.
    assert ((chosen - 1) // 5 == np.arange(10)).all()
    assert len(set(chosen.ravel().tolist())) > 45
    np.testing.assert_array_equal(sketches.some_steps(10, seed=0), chosen)
    assert (sketches.some_steps(10, seed=1) != chosen).any()
    np.testing.assert_array_equal(sketches.some_steps(60, 0), sketches.all_steps())
    assert sketches.all_steps()[3].tolist() == list(range(1, 51))


def test_rows_are_chosen_steps(drawn):
    sketches = SketchFaces(drawn.take(np.arange(5)), steps=7)
    chosen = sketches.some_steps(3, seed=0)
    rows = PartialSketches(sketches, chosen)
    wanted = [sketches.grown(n)[step - 1] for n in range(5) for step in chosen[n]]
    assert len(rows) == 15
    np.testing.assert_array_equal(rows[0:15], wanted)
    np.testing.assert_array_equal(rows[4:11], wanted[4:11])
    other = PartialSketches(sketches, sketches.some_steps(3, seed=1))
    assert rows.key() != other.key() and json.dumps(rows.key())


def test_pairs_by_hand():
    groups = np.array([0, 1, 0, 2, 0, 1])
    photos, drawings = pair_rows(groups, "photo", one_each=False)
    assert sorted(photos.tolist()) == [0, 1, 2, 3, 4, 5] and (photos == drawings).all()
    photos, drawings = pair_rows(groups, "photo", one_each=True)
    assert photos.tolist() == drawings.tolist() == [0, 1, 3]
    photos, drawings = pair_rows(groups, "other", one_each=True)
    assert photos.tolist() == [0, 1] and drawings.tolist() == [2, 5]
    photos, drawings = pair_rows(groups, "other", one_each=False)
    found = dict(zip(photos.tolist(), drawings.tolist(), strict=True))
    assert found == {0: 2, 2: 4, 4: 0, 1: 5, 5: 1}
    assert len(pair_rows(np.arange(3), "other", one_each=True)[0]) == 0


def test_real_sketches_grow():
    """Artists' drawings, which the terms of FS2K forbid shipping; the others run on drawn faces."""
    if not REAL.is_dir():
        pytest.skip("FS2K's sketches are not on this machine")
    for path in sorted((REAL / "sketch").glob("*.jpg"))[::100]:
        drawing = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        grown = grow_raster(drawing, 70)
        np.testing.assert_array_equal(grown[-1], level_paper(drawing))
        ink = (255 - grown.astype(float)).sum(axis=(1, 2)) / (255 - grown[-1].astype(float)).sum()
        assert (np.diff(ink) >= 0).all(), path
        assert ink[0] < 0.15 and 0.25 < ink[34] < 0.8, path
        assert np.mean(grown[-1] == 255) > 0.25, path


def test_records_keep_drawings(tmp_path):
    record = face_record(0, drawings=[png(sketch(0)), png(sketch(1))])
    faces_of(tmp_path / "data", [record])
    assert RecordSource(tmp_path / "data", "test")[0].drawings == record.drawings
