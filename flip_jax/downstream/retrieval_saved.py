"""Trained retrieval heads in a file: projections, ITM head and temperature of a known backbone.

backbone = Backbone.load("runs/demo")
tuned = load_heads("runs/downstream/retrieval/heads.npz", backbone)
cosines = tuned.embed_texts(["a bald man"]) @ tuned.embed_images(images).T
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.retrieval_features import HEADS, Heads
from flip_jax.downstream.saved_heads import read_heads, train_again, write_heads
from flip_jax.named_arrays import mismatches, named_leaves, nested

FILE = "heads.npz"
VERSION = 1
_TASK = "retrieval"


def save_heads(path: Path, backbone: Backbone, heads: Heads, about: dict[str, Any]) -> None:
    """Writes the file, see `saved_heads.write_heads`."""
    write_heads(path, backbone, heads, about | {"version": VERSION})


def load_heads(path: Path | str, backbone: Backbone) -> Backbone:
    """The backbone with the heads of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or its heads were trained on another backbone.
    """
    path = Path(path)
    arrays, _ = read_heads(path, backbone, _TASK, VERSION)
    wanted = named_leaves({name: backbone.params[name] for name in HEADS})
    found = {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in arrays.items()}
    if problems := mismatches(found, wanted):
        raise ValueError(f"{path} is not whole: {'; '.join(problems)}; {train_again(_TASK)}")
    params = jax.device_get(backbone.params) | nested(arrays)
    origin = {name: value for name, value in backbone.origin.items() if name != "digest"}
    options = {"batch_size": backbone.batch_size, "dtype": backbone.dtype}
    return Backbone(
        params, backbone.cfg, backbone.tokenizer, origin | {"heads": str(path)}, **options
    )
