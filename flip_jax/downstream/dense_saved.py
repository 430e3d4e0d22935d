"""A trained dense head in a file, with its tower where that was fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_training import DenseArrays, DenseNet, Output
from flip_jax.downstream.saved_heads import read_heads, train_again, write_heads
from flip_jax.named_arrays import nested

VERSION = 1


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
    sizes = {"size": net.size, "channels": net.channels, "finetune": net.finetune}
    write_heads(path, net.backbone, arrays, about | {"task": task, "version": VERSION} | sizes)


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
    named, about = read_heads(Path(path), backbone, task, VERSION)
    if about.get("task") != task:
        raise ValueError(
            f"{path} holds heads of {about.get('task', 'another task')!r}, not of {task!r}; "
            f"{train_again(task)}"
        )
    parts = nested(named)
    return DenseArrays(parts["params"], parts["stats"]), about


def net_of(about: dict[str, Any], backbone: Backbone, output: Output) -> DenseNet:
    """The net whose arrays `read_dense` gave."""
    sizes = {name: about[name] for name in ("size", "channels", "finetune")}
    return DenseNet(backbone, output, **sizes)
