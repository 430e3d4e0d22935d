"""Trained heads in a file: arrays by name, and what is known of them, of a known backbone."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.downstream.backbone import Backbone
from flip_jax.named_arrays import named_leaves

_ABOUT = "about"


def write_heads(path: Path, backbone: Backbone, heads: Any, about: dict[str, Any]) -> None:
    """Writes the file, whole or not at all.

    Args:
      backbone: what the heads were trained on.
      heads: nested dict of arrays.
      about: what is to be known of them, `version` among it; JSON types.

    Raises:
      OSError: the file cannot be written.
    """
    described = json.dumps(about | {"backbone": backbone.origin})
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(heads).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays, **{_ABOUT: np.array(described)})
    os.replace(partial, path)


def read_heads(
    path: Path, backbone: Backbone, task: str, version: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name and what is known of them.

    Args:
      task: of `python -m flip_jax.downstream`, which writes such files.
      version: the one that can be read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, of another version, or its heads were trained on another
        backbone.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {train_again(task)}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays.pop(_ABOUT)))
        found, trained_on = about["version"], about["backbone"]
        digest, checkpoint = trained_on["digest"], trained_on["checkpoint"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no {task} heads: {error}; {train_again(task)}") from error
    if found != version:
        raise ValueError(
            f"{path} has version {found!r}, this flip_jax reads {version}; {train_again(task)}"
        )
    if digest != backbone.origin["digest"]:
        raise ValueError(
            f"{path} was trained on weights {digest[:16]} ({checkpoint}), these are "
            f"{backbone.origin['digest'][:16]}; {train_again(task)}"
        )
    return arrays, about


def train_again(task: str) -> str:
    """What to do about a file that cannot be used."""
    return f"train them again with `python -m flip_jax.downstream {task}`"
