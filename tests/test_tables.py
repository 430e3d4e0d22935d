"""Tables of any kind: how labels are coded, and files that cannot be read."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_jax.data.__main__ import main
from flip_jax.data.attributes import ATTRIBUTE_INDEX
from flip_jax.data.tables import attribute_labels, read_table


def test_label_codings():
    def labels(values: list) -> list[int]:
        columns = {"Bald": pa.array(values), "unrelated": [9] * len(values)}
        found = attribute_labels(pa.table(columns))
        assert found.dtype == np.int8
        assert (np.delete(found, ATTRIBUTE_INDEX["Bald"], axis=1) == -1).all()
        return found[:, ATTRIBUTE_INDEX["Bald"]].tolist()

    assert labels([0, 1, None]) == [0, 1, -1]
    assert labels([0, 1, -1]) == [0, 1, -1]
    assert labels([-1, 1, None]) == [0, 1, -1]  # CelebA's own files
    assert labels([True, False, None]) == [1, 0, -1]
    assert labels(["1", "0", None]) == [1, 0, -1]
    for strange in ([2, 0], ["yes", "no"], [0.5, 1.0]):
        with pytest.raises(ValueError, match="column Bald"):
            labels(strange)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"file": "0.jpg", "caption": "café"}, "column caption"),
        ({"file": "0.jpg", "caption": ["a", "café"]}, "column caption"),
        ({"file": "café.jpg", "caption": "a"}, "column file"),
        ({"file": "0.jpg", "café": 1}, "the name of a column"),
    ],
)
def test_a_table_that_is_not_utf_8(tmp_path, suffix, row, what):
    path = tmp_path / f"latin{suffix}"
    if suffix == ".jsonl":
        path.write_text(f"{json.dumps(row, ensure_ascii=False)}\n", "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path, compression="none")
    assert read_table(path).to_pylist() == [row]
    if suffix == ".parquet" and what == "the name of a column":
        return  # in its footer, whose lengths would no longer be right
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9" * (1 + (suffix != ".jsonl"))))
    message = f"^table {path} cannot be read: {what} is not UTF-8; save the table as UTF-8$"
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_the_command_names_a_table_that_is_not_utf_8(tmp_path, capsys):
    path, out = tmp_path / "latin.jsonl", tmp_path / "out"
    path.write_bytes(b'{"file": "0-0.jpg", "caption": "caf\xe9"}\n')
    options = ["--table", str(path), "--images", str(tmp_path), "--out", str(out)]
    assert main(["build", *options, "--caption-column", "caption"]) == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: table {path} cannot be read: column caption is not UTF-8; "
        "save the table as UTF-8\n"
    )
    assert not out.exists()
