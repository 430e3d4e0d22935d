"""Trained SLFIR heads in a file, and a backbone with them on top.

model = load_model("runs/downstream/slfir/heads-photo.npz", Backbone.load("runs/demo"))
cosines = model.embed_sketches(sketches) @ model.embed_photos(photos).T
cosines = model.embed_queries(sketches, ["a bald man"] * len(sketches)) @ ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.downstream.backbone import Backbone, Rows
from flip_jax.downstream.saved_heads import read_heads, train_again, write_heads
from flip_jax.downstream.slfir_features import KINDS, image_features, text_features
from flip_jax.downstream.slfir_heads import Heads, project, together
from flip_jax.named_arrays import nested

VERSION = 1
_TASK = "slfir"


class SketchModel:
    """Frozen encoders and trained heads. N rows, E joint embedding, S pixels.

    Attributes:
      about: what is known of the training.
    """

    def __init__(self, backbone: Backbone, heads: Heads, kind: str, about: dict[str, Any]):
        """Args: heads: see `slfir_heads.Heads`; kind: of `slfir_features.KINDS`."""
        self.about = about
        self._backbone, self._heads, self._kind = backbone, heads, kind

    def embed_photos(self, images: Rows) -> np.ndarray:
        """uint8 [N, S, S, 3] -> float32 [N, E], unit norm."""
        features = image_features(self._backbone, images, self._kind)
        return np.asarray(project(self._heads["photo"], features))

    def embed_sketches(self, images: Rows) -> np.ndarray:
        """Dark lines on white paper, finished or not; shapes as for photos."""
        features = image_features(self._backbone, images, self._kind)
        return np.asarray(project(self._heads["sketch"], features))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 [N, E], unit norm."""
        return np.asarray(project(self._heads["text"], text_features(self._backbone, texts)))

    def embed_queries(self, images: Rows, texts: Sequence[str]) -> np.ndarray:
        """Sketch n and caption n together, float32 [N, E], unit norm."""
        return np.asarray(together(self.embed_sketches(images), self.embed_texts(texts)))


def save_heads(
    path: Path, backbone: Backbone, heads: Heads, kind: str, about: dict[str, Any]
) -> None:
    """Writes the file, see `saved_heads.write_heads`.

    Args:
      kind: of `slfir_features.KINDS`.
      about: what is to be known of the training; JSON types.
    """
    write_heads(path, backbone, heads, about | {"version": VERSION, "features": kind})


def load_model(path: Path | str, backbone: Backbone) -> SketchModel:
    """What `python -m flip_jax.downstream slfir` left in `OUT/heads-photo.npz`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or its heads were trained on another backbone.
    """
    arrays, about = read_heads(Path(path), backbone, _TASK, VERSION)
    kind = about.get("features")
    if kind not in KINDS:
        raise ValueError(
            f"{path} has features {kind!r}, this flip_jax reads {', '.join(KINDS)}; "
            f"{train_again(_TASK)}"
        )
    return SketchModel(backbone, nested(arrays), kind, about)
