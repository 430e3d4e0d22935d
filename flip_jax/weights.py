"""Weights with what belongs to them: config and vocabulary. Read from a checkpoint or an export.

An export is a folder of three files that need neither Orbax nor flip_jax to be read:

    model.safetensors   the parameters, named as in a checkpoint: `vit/blocks/attn/query/kernel`
    config.json         layout version, config, vocabulary hash, step
    vocab.txt           the vocabulary, [DEC] and [ENC] included
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flip_jax
from flip_jax import config
from flip_jax.checkpoint import load_params, read_meta
from flip_jax.config import Config
from flip_jax.config_checks import validate_model
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip
from flip_jax.named_arrays import mismatches, named_leaves, nested
from flip_jax.settings import check_types
from flip_jax.step_folder import step_folder

LAYOUT_VERSION = 1
FORMAT = "flip_jax"
EXPORT_FILES = ("config.json", "model.safetensors", "vocab.txt")
_FIELDS = ("layout_version", "step", "vocab_hash", "config")  # that reading needs
_AGAIN = "copy the folder again, or export it again with `python -m flip_jax.convert`"
VOCAB_FILE = "vocab.txt"  # also beside the items of a checkpoint that brings its vocabulary


@dataclass(frozen=True)
class Weights:
    params: dict[str, Any]  # nested dict of numpy arrays, all parameters
    cfg: Config
    meta: dict[str, Any]  # `step`, `vocab_hash` and what else is stored


def read_weights(path: Path) -> Weights:
    """All parameters of a checkpoint, a workdir (newest complete step) or an export.

    Raises:
      FileNotFoundError: none of them there.
      ValueError: it holds only a part of a model, or belongs to another version.
      OSError: stored data is damaged.
      ImportError: safetensors is not installed.
    """
    if is_export(path):
        meta, params = _read_export(path)
    else:
        folder = step_folder(path, None)  # once: a training may write the next step meanwhile
        meta, params = read_meta(folder), load_params(folder)
    cfg = _checked_config(path, meta)
    leaves = named_leaves(params)
    described = {n: {"dtype": str(v.dtype), "shape": list(v.shape)} for n, v in leaves.items()}
    wanted = jax.eval_shape(lambda: flip.init_params(cfg.model, 1.0, jax.random.key(0)))
    if problems := mismatches(described, named_leaves(wanted)):
        raise ValueError(
            f"{path} is not a whole model of its config: {'; '.join(problems)}. Part of a model "
            "(an image or text tower) is the start of a run: config.init.vision, config.init.text"
        )
    return Weights(params, cfg, meta)


def _checked_config(path: Path, meta: Mapping[str, Any]) -> Config:
    """The config beside the weights, which anybody can edit; of it the model must be possible."""
    try:
        cfg = config.from_dict(meta["config"])
        check_types(cfg, "config")
        validate_model(cfg.model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return cfg


def is_export(path: Path) -> bool:
    """Whether `path` is an export and not a checkpoint."""
    return (path / "model.safetensors").is_file()


def read_tokenizer(path: Path, weights: Weights, name: str | None = None) -> Tokenizer:
    """The vocabulary the weights were trained with.

    Args:
      path: where `weights` are from; a vocab.txt there counts before the config.
      name: as `Tokenizer.load` takes it, in place of `data.tokenizer` of the config.

    Raises:
      OSError: it is not there or cannot be had.
      ValueError: it is another vocabulary than the one the weights were trained with.
    """
    beside = path / VOCAB_FILE
    name = name or (str(beside) if beside.is_file() else weights.cfg.data.tokenizer)
    tokenizer = Tokenizer.load(name, weights.cfg.model.text.max_length)
    if tokenizer.vocab_hash != weights.meta["vocab_hash"]:
        raise ValueError(
            f"{path} was trained with the vocabulary of hash {weights.meta['vocab_hash']}; "
            f"{name!r} has {tokenizer.vocab_hash}. Give the right one as `tokenizer`"
        )
    return tokenizer


def write_export(folder: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """Writes the export folder; it must not be there.

    Raises:
      ImportError: safetensors is not installed.
    """
    folder.mkdir(parents=True)
    described = {
        "format": FORMAT,
        "layout_version": LAYOUT_VERSION,
        "flip_jax_version": flip_jax.__version__,
        "step": weights.meta["step"],
        "vocab_hash": tokenizer.vocab_hash,
        # As stored, without what a later release added: the same model keeps its digest.
        "config": weights.meta["config"],
    }
    write_tensors(folder / "model.safetensors", named_leaves(weights.params), FORMAT)
    tokenizer.save_vocab(folder / VOCAB_FILE)
    (folder / "config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], form: str) -> None:
    """Writes a safetensors file whose metadata say `form`.

    Raises:
      ImportError: safetensors is not installed.
    """
    save_file = _safetensors().save_file
    file.touch()
    mode = file.stat().st_mode  # of any new file; safetensors keeps its own from all but the owner
    # Stored in C order, whatever the order in memory.
    arrays = {name: np.require(leaf, requirements="C") for name, leaf in tensors.items()}
    save_file(arrays, file, metadata={"format": form})
    file.chmod(mode)


def _read_export(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        meta = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(meta, Mapping) or meta.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is no flip_jax export. Weights of CLIP, BERT, FaRL or the official FLIP "
            "are brought in with `python -m flip_jax.convert --from ...`"
        )
    if meta.get("layout_version", LAYOUT_VERSION) != LAYOUT_VERSION:
        raise ValueError(
            f"{folder} has layout version {meta['layout_version']}, this flip_jax reads "
            f"{LAYOUT_VERSION}; use the flip_jax that wrote it ({meta.get('flip_jax_version')})"
        )
    if absent := [field for field in _FIELDS if field not in meta]:
        raise ValueError(f"{folder}/config.json lacks {', '.join(absent)}; {_AGAIN}")
    load_file, file = _safetensors().load_file, folder / "model.safetensors"
    from safetensors import SafetensorError

    try:
        return meta, nested(load_file(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_AGAIN}") from error
    except SafetensorError as error:
        raise OSError(f"{file} is damaged or not whole ({error}); {_AGAIN}") from error


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors files need the package safetensors: pip install 'flip_jax[torch]'"
        ) from error
    return safetensors.numpy


def params_digest(params: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all arrays, 64 hex digits."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        leaf = np.ascontiguousarray(leaf)
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()
