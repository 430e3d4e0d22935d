"""A visual tokenizer in a folder of its own: `arrays.npz`, `tokenizer.json`.

`tokenizer.json` holds kind and sizes, what it was trained on and how well it does, and a digest of
sizes and arrays. The digest says which tokenizer a run was trained with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flip_jax.config import Config, from_dict
from flip_jax.models.visual_tokenizer import TokenizerConfig, VisualTokenizer, init_tokenizer
from flip_jax.named_arrays import named_leaves, nested

VERSION = 1
FORMAT = "flip_jax visual tokenizer"
ARRAYS, ABOUT = "arrays.npz", "tokenizer.json"
_NEEDED = ("encoder", "codebook")  # to give codes


def save_tokenizer(folder: Path, tokenizer: VisualTokenizer, about: Mapping[str, Any]) -> None:
    """Writes a tokenizer.

    Args:
      folder: made; must not be there.
      tokenizer: with all that is to be kept, `decoder` included.
      about: what is to be known of it; JSON types.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(tokenizer.params).items()}
    np.savez(folder / ARRAYS, **leaves)
    described = {
        "format": FORMAT,
        "version": VERSION,
        "sizes": dataclasses.asdict(tokenizer.cfg),
        "digest": _digest(tokenizer.cfg, leaves),
    }
    text = json.dumps(described | dict(about), indent=1) + "\n"
    (folder / ABOUT).write_text(text, encoding="utf-8")


def load_tokenizer(
    folder: Path | str, *, whole: bool = False
) -> tuple[VisualTokenizer, dict[str, Any]]:
    """Reads a tokenizer.

    Args:
      whole: with the decoder, which codes do not need.

    Returns:
      (tokenizer of numpy arrays, what `tokenizer.json` holds)

    Raises:
      FileNotFoundError: none there.
      ValueError: not one of this version, or damaged.
    """
    folder = Path(folder)
    again = "train it again with `python -m flip_jax.visual_tokenizer train`, or convert it again"
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(f"{folder} holds no {ABOUT}, so no visual tokenizer; {again}")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        version = about.get("version") if about.get("format") == FORMAT else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / ABOUT} cannot be read: {error}; {again}") from error
    if version != VERSION:
        raise ValueError(
            f"{folder} is no visual tokenizer of version {VERSION}, which this flip_jax reads, but "
            f"{about.get('format')!r} of version {about.get('version')!r}; {again}"
        )
    try:
        cfg = from_dict(about["sizes"], TokenizerConfig)
        with np.load(folder / ARRAYS, allow_pickle=False) as stored:
            leaves = {name: stored[name] for name in stored.files}
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder} is no whole visual tokenizer: {error}; {again}") from error
    if _digest(cfg, leaves) != about.get("digest"):
        raise ValueError(f"{folder / ARRAYS} is not the file that {ABOUT} describes; {again}")
    params = nested(leaves)
    if not whole:
        params = {name: params[name] for name in _NEEDED if name in params}
    return VisualTokenizer(params, cfg), about


def tokenizer_of(cfg: Config) -> tuple[VisualTokenizer, str] | None:
    """The tokenizer that a run's codes come from and its digest; None if it needs none.

    Raises:
      ValueError: it cannot be read, or does not have `model.mim_vocab` codes.
      FileNotFoundError: none there.
    """
    path = cfg.loss.mim_tokenizer
    if path is None or not cfg.loss.weights.mim:
        return None
    try:
        tokenizer, about = load_tokenizer(path)
    except (ValueError, OSError) as error:
        raise type(error)(f"config.loss.mim_tokenizer={path!r}: {error}") from error
    codes = tokenizer.cfg.codes
    if codes != cfg.model.mim_vocab:
        raise ValueError(
            f"config.model.mim_vocab={cfg.model.mim_vocab}: the visual tokenizer {path} has "
            f"{codes} codes; set --config.model.mim_vocab={codes} or another loss.mim_tokenizer"
        )
    return tokenizer, about["digest"]


def _digest(cfg: TokenizerConfig, leaves: Mapping[str, np.ndarray]) -> str:
    """64 hex digits over sizes, names, shapes and bits."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(cfg), sort_keys=True).encode())
    for name in sorted(leaves):
        value = np.asarray(leaves[name], "<f4", order="C")
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def shapes_of(cfg: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays that `init_tokenizer` makes."""
    tree = jax.eval_shape(lambda: init_tokenizer(cfg, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in named_leaves(tree).items()}
