"""FaceCaption-15M and LAION-Face: tables without pictures."""

import numpy as np
import published_layouts as layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_jax.data.readers.url_tables import URL_SCHEMA, face_caption_batches, laion_face_batches


def rows(batches) -> list[dict]:
    batches = list(batches)
    assert all(batch.schema.equals(URL_SCHEMA) for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


@pytest.mark.parametrize("name", ["", "FaceCaption-v2.parquet"])
def test_face_caption(tmp_path, name):
    layouts.face_caption(tmp_path)
    found = rows(face_caption_batches(tmp_path / name))
    assert [row["id"] for row in found] == [f"id{n}" for n in range(6)]
    addresses = ["https://a.example/0.jpg", "https://a.example/1.jpg", None, None]
    assert [row["url"] for row in found] == [*addresses, "https://a.example/4.jpg", None]
    assert [row["caption"] for row in found] == [*(f"Caption {n}." for n in range(5)), None]
    assert [row["alt_text"] for row in found] == ["Alt 0", "Alt 1", None, None, None, "Alt 5"]
    assert [row["box"] for row in found] == [[1, 2, 30, 40], [1.5, 2, 30, 40], *[None] * 4]
    assert {row["licence"] for row in found} == {None}


def test_face_caption_with_plain_columns(tmp_path):
    columns = {
        "_id": [7, 8],
        "url": ["https://a.example/7.jpg", "https://a.example/8.jpg"],
        "caption": ["Text 7.", None],
        "laion_caption": pa.array([["Alt 7"], None], pa.large_list(pa.string())),
        "box": [[1, 2, 3, 4], [1, 2, 3]],
    }
    pq.write_table(pa.table(columns), tmp_path / "any.parquet")
    found = rows(face_caption_batches(tmp_path / "any.parquet"))
    assert [row["id"] for row in found] == ["7", "8"]
    assert [row["caption"] for row in found] == ["Text 7.", None]
    assert [row["alt_text"] for row in found] == ["Alt 7", None]
    assert [row["box"] for row in found] == [[1, 2, 3, 4], None]


def test_laion_face(tmp_path):
    layouts.laion_face(tmp_path)
    found = rows(laion_face_batches(tmp_path))
    # Parts in order; the row without id is left out; a float64 id keeps all its digits.
    assert [row["id"] for row in found] == [str(2**41 + n) for n in (0, 1, 2, 10, 11, 12)]
    assert found[0]["url"] == "https://b.example/0/0.jpg"
    assert [row["alt_text"] for row in found[:3]] == ["a face", None, "two faces, one page"]
    assert [row["licence"] for row in found[:3]] == ["?", "CC-BY", None]
    assert {row["caption"] for row in found} == {None} == {row["box"] for row in found}
    assert rows(laion_face_batches(tmp_path / "laion_face_part_00001.parquet")) == found[3:]


def test_batches_are_as_small_as_asked(tmp_path):
    layouts.face_caption(tmp_path)
    sizes = [len(batch) for batch in face_caption_batches(tmp_path, batch_rows=3)]
    assert max(sizes) == 3 and sum(sizes) == 6


def test_memory_does_not_grow_with_the_table(tmp_path):
    """200,000 rows pass in a tenth of the memory that they take as a whole."""
    numbers = np.arange(200_000)
    table = pa.table(
        {
            "SAMPLE_ID": numbers,
            "URL": pa.array([f"https://b.example/{n}/{'x' * 60}.jpg" for n in numbers]),
            "TEXT": pa.array(["some words about a face"] * len(numbers)),
            "LICENSE": pa.array(["?"] * len(numbers)),
        }
    )
    pq.write_table(table, tmp_path / "laion_face_part_00000.parquet", row_group_size=5_000)
    size = table.nbytes
    del table
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for batch in laion_face_batches(tmp_path, batch_rows=2_000):
        count += len(batch)
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == 200_000 and peak < size / 10


@pytest.mark.parametrize("read", [face_caption_batches, laion_face_batches])
def test_unusable_tables(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        next(read(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet is missing\. Needed is "):
        next(read(tmp_path / "absent.parquet"))
    broken = layouts.save(tmp_path / "broken.parquet", b"PAR1 no")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read"):
        next(read(broken))
    pq.write_table(pa.table({"url": ["a"], "URL": ["b"]}), broken)
    with pytest.raises(ValueError, match=r"broken\.parquet has no column .*; it has url, URL"):
        next(read(broken))
