"""Weights of others -> a checkpoint that a run can start from, proved on fixed inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flip_jax import config
from flip_jax.checkpoint import load_momentum, load_params, save_weights
from flip_jax.config import Config, ModelConfig
from flip_jax.convert import torch_flip
from flip_jax.convert.bert import read_bert
from flip_jax.convert.check import (
    Inputs,
    Outputs,
    compare,
    fixed_inputs,
    our_outputs,
    with_twins,
)
from flip_jax.convert.clip import read_clip, read_farl
from flip_jax.convert.conversion import ConversionError, whole_or_absent
from flip_jax.convert.foreign import Foreign, Options
from flip_jax.convert.official import read_official
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models.position_table import resize_position_table
from flip_jax.weights import VOCAB_FILE

READERS = {"flip": read_official, "clip": read_clip, "bert": read_bert, "farl": read_farl}


def import_weights(kind: str, source: Path, out: Path, options: Options) -> str:
    """Reads `source`, writes the checkpoint `out`, runs both on the same inputs.

    Args:
      kind: a key of `READERS`.
      source: file or folder, see the readers.
      out: folder to be made: params, momentum where the source has it, meta, vocab.txt.

    Returns:
      What was done and the table of errors, for the user.

    Raises:
      ConversionError: the weights do not fit, or the outputs differ; no `out` then.
      FileExistsError: `out` is there before.
      OSError: `source` or the vocabulary cannot be read, `out` cannot be written.
    """
    with whole_or_absent(out) as partial:
        foreign = READERS[kind](source, options)
        cfg = _resize(foreign, options.image_size)
        inputs = fixed_inputs(cfg.model, foreign.tokens)
        tokenizer = _tokenizer(foreign, cfg.model)
        meta = {
            "config": config.to_dict(cfg),
            "vocab_hash": tokenizer and tokenizer.vocab_hash,
            "data_hash": None,
            "source": {"format": kind, "name": source.name, "options": dataclasses.asdict(options)},
        }
        expected = foreign.run(inputs)
        params, momentum = _params(foreign.state, cfg.model), _momentum(foreign.state, cfg.model)
        foreign.release()
        save_weights(partial, params, meta, momentum=momentum)
        del params, momentum  # what is compared is read from disk
        if tokenizer:
            tokenizer.save_vocab(partial / VOCAB_FILE)
        table = compare(expected, _written_outputs(partial, cfg.model, inputs))
    return "\n".join([*foreign.notes, table, f"written: {out}"])


def _resize(foreign: Foreign, image_size: int | None) -> Config:
    """Brings the position tables to `image_size`; returns the config of the result."""
    vision = foreign.model.vision
    if image_size is not None and image_size != vision.image_size:
        if image_size < 1 or image_size % vision.patch_size:
            raise ConversionError(
                f"--image-size {image_size} is no multiple of the patch size {vision.patch_size}"
            )
        vision = dataclasses.replace(vision, image_size=image_size)
        side = image_size // vision.patch_size
        tables = [n for n in foreign.state if n.endswith("embeddings.position_embedding.weight")]
        for name in tables:
            foreign.state[name] = resize_position_table(foreign.state[name], side)
        foreign.notes.append(f"{len(tables)} position table(s) resized to {side} x {side}, bicubic")
    cfg = Config(model=dataclasses.replace(foreign.model, vision=vision))
    if foreign.tokenizer:
        data = dataclasses.replace(cfg.data, tokenizer=foreign.tokenizer)
        cfg = dataclasses.replace(cfg, data=data)
    if "image_queue" in foreign.state:
        size = foreign.state["image_queue"].shape[1]
        cfg = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, queue_size=size))
    return cfg


def _tokenizer(foreign: Foreign, model: ModelConfig) -> Tokenizer | None:
    """The vocabulary, checked against the word table; None without a text tower."""
    if foreign.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(foreign.tokenizer, model.text.max_length)
    if (tokenizer.vocab_size, tokenizer.enc_id) != (model.text.vocab_size, model.text.enc_id):
        raise ConversionError(
            f"the word table has {model.text.vocab_size} rows and [ENC] at {model.text.enc_id}, "
            f"the vocabulary {foreign.tokenizer!r} has {tokenizer.vocab_size} entries and [ENC] at "
            f"{tokenizer.enc_id}; give the one that belongs to the weights with --tokenizer"
        )
    return tokenizer


def _params(state: dict, model: ModelConfig) -> dict:
    present = [e for e in torch_flip.entries(model) if e.official in state]
    return torch_flip.tree_from_official(state, present)


def _momentum(state: dict, model: ModelConfig) -> dict:
    momentum = {}
    if "vision_proj_m.weight" in state:
        momentum["twins"] = torch_flip.params_from_official(state, model, twin=True)
    if "image_queue" in state:
        momentum["queue"] = torch_flip.queue_from_official(state)
    return momentum


def _written_outputs(folder: Path, model: ModelConfig, inputs: Inputs) -> Outputs:
    params, twins = load_params(folder), load_momentum(folder).get("twins")
    return with_twins(
        lambda twin: our_outputs(params | twins if twin else params, model, inputs),
        twins is not None,
    )
