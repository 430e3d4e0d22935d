"""A trained attribute probe in a folder of its own: image tower and head, ready for pictures.

    probe = load_probe("runs/attributes/probe")
    probabilities = probe.probabilities([picture, "…".read_bytes()])   # float32 [N, 40]

The folder holds `arrays.npz` (tower and head by name) and `probe.json` (format, kind of head,
config of the tower, what it was trained on, SHA-256 of the arrays), written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flip_jax.config import VisionConfig, from_dict
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import file_sha256
from flip_jax.data.transforms import BadImage, decode_image, resize_image
from flip_jax.downstream.attribute_head import HEADS, Head, head_logits, normalize_states
from flip_jax.downstream.backbone import Backbone, pool_states
from flip_jax.models.vit import VisionTransformer
from flip_jax.named_arrays import named_leaves, nested

VERSION = 1
_ARRAYS, _ABOUT = "arrays.npz", "probe.json"


class Probe:
    """An image tower and an attribute head.

    Attributes:
      attributes: names of the 40 columns.
      image_size: pixels; pictures of another size are squashed to a square.
      digest: 64 hex digits; probes of one digest say the same of a picture.
      about: what `probe.json` holds.
    """

    def __init__(self, vit: dict[str, Any], head: Head, about: dict[str, Any]):
        self.about = about
        parts = [about[name] for name in ("sha256", "kind", "blocks", "vision")]
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self.attributes = tuple(about["attributes"])
        vision = from_dict(about["vision"], VisionConfig)
        self.image_size = vision.image_size
        kind, blocks = about["kind"], tuple(about["blocks"])

        def tower() -> VisionTransformer:
            rngs = nnx.Rngs(0)
            return VisionTransformer(vision, dtype=jnp.float32, remat="none", rngs=rngs)

        graphdef = nnx.split(nnx.eval_shape(tower))[0]
        self._arrays = jax.device_put((vit, head))

        @jax.jit
        def run(arrays: tuple[dict, Head], image: jax.Array) -> jax.Array:
            vit, head = arrays
            states = pool_states(nnx.merge(graphdef, vit), image, blocks, kind == "flip")
            return jax.nn.sigmoid(head_logits(kind, head, normalize_states(states)))

        self._run = run

    def probabilities(
        self, images: Sequence[np.ndarray | bytes] | np.ndarray, batch_size: int = 64
    ) -> np.ndarray:
        """How likely each attribute is.

        Args:
          images: N pictures: uint8 [H, W, 3] RGB of any size, or the bytes of picture files.
          batch_size: pictures that run at once.

        Returns:
          float32 [N, 40] in the order of `attributes`. What is said of a picture does not depend
          on those beside it.

        Raises:
          BadImage: bytes that are no whole picture; names the index.
          ValueError: an array of another dtype or shape.
        """
        found = []
        for start in range(0, len(images), batch_size):
            rows = range(start, min(start + batch_size, len(images)))
            batch = np.stack([self._pixels(images[row], row) for row in rows])
            # Filled up to a power of two, so few shapes are ever compiled.
            size = min(1 << (len(rows) - 1).bit_length(), batch_size)
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(rows), 0)])
            found.append(np.asarray(self._run(self._arrays, batch))[: len(rows)])
        return np.concatenate(found) if found else np.zeros((0, len(self.attributes)), np.float32)

    def _pixels(self, image: np.ndarray | bytes, row: int) -> np.ndarray:
        if isinstance(image, bytes):
            try:
                image = decode_image(image)
            except BadImage as error:
                raise BadImage(f"picture {row}: {error}") from error
        if not (
            isinstance(image, np.ndarray)
            and image.dtype == np.uint8
            and image.ndim == 3
            and image.shape[2] == 3
        ):
            kind = getattr(image, "dtype", type(image).__name__)
            raise ValueError(
                f"picture {row} is {kind} {list(np.shape(image))}; give uint8 [H, W, 3], RGB, or "
                "the bytes of a picture file"
            )
        return resize_image(image, self.image_size)


def save_probe(
    folder: Path, backbone: Backbone, kind: str, head: Head, about: dict[str, Any]
) -> None:
    """Writes a probe; a probe that is there already is replaced.

    Args:
      folder: made if absent.
      backbone: its image tower is stored.
      kind: one of `attribute_head.HEADS`; head: its arrays.
      about: what is to be known of the training; JSON types.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ABOUT).unlink(missing_ok=True)  # until the new one is whole, there is none
    vit = jax.device_get(backbone.params["vit"])
    arrays = {f"vit/{name}": leaf for name, leaf in named_leaves(vit).items()}
    arrays |= {f"head/{name}": leaf for name, leaf in named_leaves(head).items()}
    partial = folder / (_ARRAYS + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **{name: np.asarray(leaf) for name, leaf in arrays.items()})
    os.replace(partial, folder / _ARRAYS)
    described = about | {
        "format": "flip_jax attribute probe",
        "version": VERSION,
        "kind": kind,
        "blocks": list(backbone.blocks),
        "attributes": list(ATTRIBUTES),
        "vision": dataclasses.asdict(backbone.cfg.model.vision),
        "backbone": backbone.origin,
        "sha256": file_sha256(folder / _ARRAYS),
    }
    partial = folder / (_ABOUT + ".partial")
    partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / _ABOUT)


def load_probe(folder: Path | str) -> Probe:
    """Reads what `python -m flip_jax.downstream attributes` left in `OUT/probe`.

    Raises:
      FileNotFoundError: no probe there.
      ValueError: no probe of this version, or damaged.
    """
    folder = Path(folder)
    again = "train it again with `python -m flip_jax.downstream attributes`"
    if not (folder / _ABOUT).is_file():
        raise FileNotFoundError(f"{folder} holds no {_ABOUT}, so no whole probe; {again}")
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        version = about.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _ABOUT} cannot be read: {error}; {again}") from error
    if version != VERSION or about.get("kind") not in HEADS:
        raise ValueError(
            f"{folder} is a probe of version {version!r} and kind {about.get('kind')!r}, this "
            f"flip_jax reads version {VERSION} of {', '.join(HEADS)}; {again}"
        )
    path = folder / _ARRAYS
    if not path.is_file() or file_sha256(path) != about.get("sha256"):
        raise ValueError(f"{path} is missing or not the file that {_ABOUT} describes; {again}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = nested({name: stored[name] for name in stored.files})
        return Probe(arrays["vit"], arrays["head"], about)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder} is no whole probe: {error}; {again}") from error
