"""`flip_jax.huge_pages`: a program that starts itself again does so once, with its arguments."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, pathlib, sys
from flip_jax import huge_pages
huge_pages._STATE = pathlib.Path(sys.argv[1])
print("start")
huge_pages.restart_with_huge_pages()
print(os.getpid(), sys.argv[2:], os.environ.get("GLIBC_TUNABLES"))
"""
ASKED = "glibc.malloc.hugetlb=1"
OTHER = "glibc.malloc.arena_max=2"


@pytest.mark.parametrize(
    ("state", "before", "starts", "after"),
    [
        ("always [madvise] never", None, 2, ASKED),
        ("always [madvise] never", OTHER, 2, f"{OTHER}:{ASKED}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, 1, None),
        ("always madvise [never]", None, 1, None),
        (None, None, 1, None),
    ],
)
def test_program_starts_again_where_there_is_something_to_ask(
    tmp_path, state, before, starts, after
):
    path = tmp_path / "enabled"
    if state is not None:
        path.write_text(state)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if before is not None:
        environment["GLIBC_TUNABLES"] = before
    command = [sys.executable, "-c", PROGRAM, str(path), "a b", "--c=d"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = process.communicate(timeout=60)[0].splitlines()
    # The process stays the same one, for whoever waits for it or sends it signals.
    assert lines == ["start"] * starts + [f"{process.pid} ['a b', '--c=d'] {after}"]
    assert process.returncode == 0
