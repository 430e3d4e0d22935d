"""Memory in huge pages, for programs that compute on the CPU.

A training step takes and gives back hundreds of megabytes, every 4 KiB page of which costs a page
fault; with pages of 2 MiB these are all but gone. Figures: docs/performance.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Has `[madvise]` where Linux gives huge pages to those who ask.
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Starts this program again, once, with a malloc that asks for huge pages.

    To be called first: glibc reads the setting when a process starts. Does nothing where there is
    nothing to ask (another system, all memory or none in huge pages) or where GLIBC_TUNABLES sets
    it already; `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` turns it off. Other C libraries and glibc
    before 2.35 do not know the setting and ignore it.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    try:
        may_ask = "[madvise]" in _STATE.read_text()
    except OSError:
        may_ask = False
    if not may_ask or _TUNABLE in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
