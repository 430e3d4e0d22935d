"""Which split a group goes to."""

from __future__ import annotations

import hashlib

from flip_jax.curate.config import SplitConfig


def split_of(group: str, cfg: SplitConfig) -> str:
    """Returns `train`, `val` or `test`, by a hash of the group: never by what else is there."""
    digest = hashlib.blake2b(f"{cfg.seed}:{group}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "little") / 2**64
    if point < cfg.train:
        return "train"
    return "val" if point < cfg.train + cfg.val else "test"
