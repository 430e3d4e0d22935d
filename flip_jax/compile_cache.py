"""Compiled programs kept in the workdir: a run that goes on there does not compile them again.

Figures: docs/performance.md.
"""

from __future__ import annotations

from pathlib import Path

import jax

FOLDER = "compiled"


def keep_compiled(workdir: Path) -> None:
    """Has JAX look programs up in `workdir/compiled` and write there what it had to compile.

    To be called before the first compilation. A program is found again by its code, its options,
    the versions and the kind of the devices. All processes of a run share the workdir, so that all
    of them find it or none. Where JAX_COMPILATION_CACHE_DIR names a folder that one is used; where
    it is empty, none.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / FOLDER))
