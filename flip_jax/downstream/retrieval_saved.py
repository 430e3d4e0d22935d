"""Trained retrieval heads in a file: projections, ITM head and temperature of a known backbone.

backbone = Backbone.load("runs/demo")
tuned = load_heads("runs/downstream/retrieval/heads.npz", backbone)
cosines = tuned.embed_texts(["a bald man"]) @ tuned.embed_images(images).T
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.retrieval_features import HEADS, Heads
from flip_jax.named_arrays import mismatches, named_leaves, nested

FILE = "heads.npz"
VERSION = 1
_ABOUT = "about"


def save_heads(path: Path, backbone: Backbone, heads: Heads, about: dict[str, Any]) -> None:
    """Writes the file, whole or not at all.

    Args:
      backbone: what the heads were trained on.
      about: what is to be known of the training; JSON types.

    Raises:
      OSError: the file cannot be written.
    """
    described = about | {"version": VERSION, "backbone": backbone.origin}
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(heads).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays, **{_ABOUT: np.array(json.dumps(described))})
    os.replace(partial, path)


def load_heads(path: Path | str, backbone: Backbone) -> Backbone:
    """The backbone with the heads of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or its heads were trained on another backbone.
    """
    path = Path(path)
    again = "train them again with `python -m flip_jax.downstream retrieval`"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {again}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays.pop(_ABOUT)))
        version, digest = about["version"], about["backbone"]["digest"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no retrieval heads: {error}; {again}") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this flip_jax reads {VERSION}; {again}")
    if digest != backbone.origin["digest"]:
        raise ValueError(
            f"{path} was trained on weights {digest[:16]} ({about['backbone']['checkpoint']}), "
            f"these are {backbone.origin['digest'][:16]}; {again}"
        )
    wanted = named_leaves({name: backbone.params[name] for name in HEADS})
    found = {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in arrays.items()}
    if problems := mismatches(found, wanted):
        raise ValueError(f"{path} is not whole: {'; '.join(problems)}; {again}")
    params = jax.device_get(backbone.params) | nested(arrays)
    origin = {name: value for name, value in backbone.origin.items() if name != "digest"}
    options = {"batch_size": backbone.batch_size, "dtype": backbone.dtype}
    return Backbone(
        params, backbone.cfg, backbone.tokenizer, origin | {"heads": str(path)}, **options
    )
