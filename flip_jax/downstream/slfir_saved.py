"""Trained SLFIR heads in a file, and a backbone with them on top.

model = load_model("runs/downstream/slfir/heads-photo.npz", Backbone.load("runs/demo"))
cosines = model.embed_sketches(sketches) @ model.embed_photos(photos).T
cosines = model.embed_queries(sketches, ["a bald man"] * len(sketches)) @ ...
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.downstream.backbone import Backbone, Rows
from flip_jax.downstream.slfir_features import KINDS, image_features, text_features
from flip_jax.downstream.slfir_heads import Heads, project, together
from flip_jax.named_arrays import named_leaves, nested

VERSION = 1
_ABOUT = "about"


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
    """Writes the file, whole or not at all.

    Args:
      backbone: what the heads were trained on.
      kind: of `slfir_features.KINDS`.
      about: what is to be known of the training; JSON types.

    Raises:
      OSError: the file cannot be written.
    """
    described = about | {"version": VERSION, "features": kind, "backbone": backbone.origin}
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(heads).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays, **{_ABOUT: np.array(json.dumps(described))})
    os.replace(partial, path)


def load_model(path: Path | str, backbone: Backbone) -> SketchModel:
    """What `python -m flip_jax.downstream slfir` left in `OUT/heads-photo.npz`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or its heads were trained on another backbone.
    """
    path = Path(path)
    again = "train them again with `python -m flip_jax.downstream slfir`"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {again}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays.pop(_ABOUT)))
        version, kind, digest = about["version"], about["features"], about["backbone"]["digest"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no SLFIR heads: {error}; {again}") from error
    if version != VERSION or kind not in KINDS:
        raise ValueError(
            f"{path} has version {version!r} and features {kind!r}, this flip_jax reads version "
            f"{VERSION} of {', '.join(KINDS)}; {again}"
        )
    if digest != backbone.origin["digest"]:
        raise ValueError(
            f"{path} was trained on weights {digest[:16]} ({about['backbone']['checkpoint']}), "
            f"these are {backbone.origin['digest'][:16]}; {again}"
        )
    return SketchModel(backbone, nested(arrays), kind, about)
