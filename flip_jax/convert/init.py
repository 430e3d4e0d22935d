"""Imported weights as the start of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flip_jax import config
from flip_jax.checkpoint import load_momentum, load_params, newest_step, read_meta
from flip_jax.config import Config
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip
from flip_jax.named_arrays import mismatches, named_leaves, nested

_log = logging.getLogger(__name__)

# Config field -> which parameters it brings; later ones win.
FIELDS = {"checkpoint": "*", "vision": "vit/*", "text": "bert/*"}
# What of the model config must be equal although no array's shape shows it.
_INVISIBLE = {"vision": ("heads", "patch_size"), "text": ("heads",)}


def start_folders(cfg: Config) -> dict[str, Path]:
    """Field of `cfg.init` -> folder of the step to read, where one is given.

    Raises:
      FileNotFoundError: no checkpoint there.
    """
    given = {field: getattr(cfg.init, field) for field in FIELDS}
    return {field: newest_step(path) for field, path in given.items() if path is not None}


def initial_params(
    cfg: Config, params: flip.Params, folders: Mapping[str, Path] | None = None
) -> flip.Params:
    """`params` with what `cfg.init` names in place of fresh values.

    `init.checkpoint` brings all parameters it has, `init.vision` those of the image tower,
    `init.text` those of the text tower; a more special field wins. Each is a checkpoint: a folder
    written by `python -m flip_jax.convert`, a workdir, or a step's folder. What none of them has
    stays fresh (with BERT: the cross-attention). Heads of a loss that this run has not (MIM,
    captions, the bias of the sigmoid loss) are left out.

    Args:
      params: fresh parameters; arrays go to their shardings.
      folders: what `start_folders` says; by default as of now.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: it has no such parameters, or sizes or vocabulary differ from `cfg`.
    """
    fresh = named_leaves(params)
    for field, folder in (start_folders(cfg) if folders is None else folders).items():
        path = getattr(cfg.init, field)
        loaded = _without_other_heads(load_params(folder, only=FIELDS[field]), fresh, field)
        _check(field, folder, cfg, loaded, fresh)
        fresh |= {n: jax.device_put(v, fresh[n].sharding) for n, v in loaded.items()}
        _log.info("init.%s: %d of %d arrays from %s", field, len(loaded), len(fresh), path)
    return nested(fresh)


def _without_other_heads(
    params: flip.Params, fresh: Mapping[str, Any], field: str
) -> dict[str, Any]:
    """Arrays by name, without those of a loss that this run has not."""
    loaded = named_leaves(params)
    excess = [n for n in loaded if n not in fresh and n.split("/")[0] in flip.OF_A_LOSS]
    if excess:
        _log.info("init.%s: left out, as this run has no such loss: %s", field, ", ".join(excess))
    return {name: value for name, value in loaded.items() if name not in excess}


def initial_state(cfg: Config, state: Mapping[str, Any]) -> dict[str, Any]:
    """A fresh train state with the weights that `cfg.init` names.

    The momentum twins come from `init.checkpoint` if it has them and no other field is given, else
    they are copies of the parameters. The queue comes from `init.checkpoint` if it has one of
    `loss.queue_size`, else it stays fresh. The sigmoid loss has neither.
    Optimizer state and step are left as they are.

    Raises:
      See `initial_params`.
    """
    init = cfg.init
    if not any(getattr(init, field) for field in FIELDS):
        return dict(state)
    folders = start_folders(cfg)
    params = initial_params(cfg, state["params"], folders)
    if not state["momentum"]:
        return {**state, "params": params}
    stored = load_momentum(folders["checkpoint"]) if init.checkpoint else {}
    twins, queue = stored.get("twins"), stored.get("queue")
    if twins is None or init.vision or init.text:
        twins = jax.tree.map(jnp.copy, flip.twin_params(params))
    else:
        # Those of a checkpoint of another MIM masking may lack the decoder, or have it in excess.
        own = flip.twin_params(params)
        twins = {name: twins.get(name, jax.tree.map(jnp.copy, own[name])) for name in own}
        twins = _placed(twins, state["momentum"])
    if queue is not None and queue["group"].shape != state["queue"]["group"].shape:
        _log.warning(
            "init.checkpoint has a queue of %d, loss.queue_size is %d: it starts afresh",
            len(queue["group"]),
            cfg.loss.queue_size,
        )
        queue = None
    queue = state["queue"] if queue is None else _placed(queue, state["queue"])
    return {**state, "params": params, "momentum": twins, "queue": queue}


def _placed(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda value, old: jax.device_put(value, old.sharding), values, dict(like))


def _check(
    field: str, folder: Path, cfg: Config, loaded: Mapping[str, Any], fresh: Mapping[str, Any]
) -> None:
    meta = read_meta(folder)
    described = {n: {"dtype": str(v.dtype), "shape": list(v.shape)} for n, v in loaded.items()}
    wanted = {name: leaf for name, leaf in fresh.items() if name in loaded}
    problems = mismatches(described, wanted)
    towers = [tower for tower, part in (("vision", "vit"), ("text", "bert")) if _has(loaded, part)]
    stored, own = meta["config"]["model"], config.to_dict(cfg)["model"]
    for tower in towers:
        for name in _INVISIBLE[tower]:
            if stored[tower][name] != own[tower][name]:
                problems.append(
                    f"model.{tower}.{name} is {stored[tower][name]}, not {own[tower][name]}"
                )
    if "text" in towers and meta["vocab_hash"]:
        tokenizer = Tokenizer.load(cfg.data.tokenizer, cfg.model.text.max_length)
        if tokenizer.vocab_hash != meta["vocab_hash"]:
            problems.append(
                f"its vocabulary, {meta['config']['data']['tokenizer']!r}, is not that of "
                f"data.tokenizer={cfg.data.tokenizer!r}"
            )
    if problems:
        raise ValueError(
            f"config.init.{field}={getattr(cfg.init, field)!r} does not fit the config: "
            f"{'; '.join(problems)}. Change config.model or config.data.tokenizer, or convert "
            "again (--image-size, --vision-heads, --text-heads, --tokenizer)"
        )


def _has(leaves: Mapping[str, Any], part: str) -> bool:
    return any(name.startswith(f"{part}/") for name in leaves)
