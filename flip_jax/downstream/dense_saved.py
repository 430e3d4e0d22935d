"""A trained dense head in a file, with its tower where that was fine-tuned.

The file is an `npz` of the arrays by name and a JSON text `about`: task, version, sizes, backbone,
and what the task wants to be known.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_training import DenseArrays, DenseNet, Output
from flip_jax.named_arrays import named_leaves, nested

VERSION = 1
_ABOUT = "about"


def save_dense(
    path: Path, task: str, net: DenseNet, arrays: DenseArrays, about: dict[str, Any]
) -> None:
    """Writes the file, whole or not at all.

    Args:
      task: its name on the command line.
      about: what reading needs besides the arrays; JSON types.

    Raises:
      OSError: the file cannot be written.
    """
    described = about | {
        "task": task,
        "version": VERSION,
        "size": net.size,
        "channels": net.channels,
        "finetune": net.finetune,
        "backbone": net.backbone.origin,
    }
    named = {name: np.asarray(leaf) for name, leaf in named_leaves(arrays).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **named, **{_ABOUT: np.array(json.dumps(described))})
    os.replace(partial, path)


def read_dense(
    path: Path | str, task: str, backbone: Backbone
) -> tuple[DenseArrays, dict[str, Any]]:
    """The arrays, and what is known of them.

    Args:
      backbone: what the head was trained on; a fine-tuned tower replaces its image tower.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, of another task or version, or trained on another backbone.
    """
    path = Path(path)
    again = f"train it again with `python -m flip_jax.downstream {task}`"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {again}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays.pop(_ABOUT)))
        found = about["task"], about["version"]
        digest, parts = about["backbone"]["digest"], nested(arrays)
        arrays = DenseArrays(parts["params"], parts["stats"])
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no dense head: {error}; {again}") from error
    if found != (task, VERSION):
        raise ValueError(
            f"{path} is of task {found[0]!r} and version {found[1]!r}, wanted are {task!r} and "
            f"{VERSION}; {again}"
        )
    if digest != backbone.origin["digest"]:
        raise ValueError(
            f"{path} was trained on weights {digest[:16]} ({about['backbone']['checkpoint']}), "
            f"these are {backbone.origin['digest'][:16]}; {again}"
        )
    return arrays, about


def net_of(about: dict[str, Any], backbone: Backbone, output: Output) -> DenseNet:
    """The net whose arrays `read_dense` gave."""
    sizes = {name: about[name] for name in ("size", "channels", "finetune")}
    return DenseNet(backbone, output, **sizes)
