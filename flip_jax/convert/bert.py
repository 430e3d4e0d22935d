"""BERT as the start of the text tower. Source: arXiv 1810.04805; Hugging Face names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flip_jax.config import DataConfig, ModelConfig, TextConfig
from flip_jax.convert import torch_flip
from flip_jax.convert.check import Inputs, Outputs
from flip_jax.convert.conversion import ConversionError
from flip_jax.convert.foreign import Foreign, InitialValues, Options, Slot, gather, text_sizes
from flip_jax.convert.weight_files import read_config, read_tensors
from flip_jax.data.tokenizer import ADDED_TOKENS, Tokenizer

_OFFICIAL = "text_encoder."
_WORDS = f"{_OFFICIAL}embeddings.word_embeddings.weight"
_POSITIONS = f"{_OFFICIAL}embeddings.position_embeddings.weight"
_TYPES = f"{_OFFICIAL}embeddings.token_type_embeddings.weight"
ADDED_ROW_STD = 0.02  # BERT's own initial deviation; the official implementation's rule too
# The first BERT files call LayerNorm's weight and bias gamma and beta.
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_HEADS = ("cls.*", "classifier.*", "qa_outputs.*")
_CONFIG = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}


def read_bert(path: Path, options: Options) -> Foreign:
    """The encoder of a Hugging Face BERT folder or file, uncased WordPiece.

    Our text tower has no token types: the type-0 vector, which BERT adds to every token, is added
    to the rows of the position table, which computes the same. The official implementation drops
    it; so does `options.as_reference`. Rows for [DEC] and [ENC] are drawn, normal with deviation
    0.02, where the source's vocabulary lacks them.

    Raises:
      ConversionError: the tensors or the vocabulary do not fit, or config.json names another
        architecture.
      FileNotFoundError: nothing there.
    """
    tensors = {_current_name(name): value for name, value in read_tensors(path).items()}
    config = read_config(path) or {}
    for field, wanted in _CONFIG.items():
        if config.get(field, wanted) != wanted:
            raise ConversionError(
                f"config.json says {field}={config[field]!r}; the text tower has {wanted!r}"
            )
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    heads = options.text_heads
    heads = config.get("num_attention_heads") if heads is None else heads
    text = text_sizes(tensors, prefix=prefix, heads=heads)
    state, source = _gather(tensors, prefix, ModelConfig(text=text), options)

    notes = []
    type_zero = state.pop(_TYPES)[0]
    if options.as_reference:
        notes.append("as the reference: BERT's type-0 vector is dropped")
    else:
        state[_POSITIONS] = state[_POSITIONS] + type_zero
        notes.append("BERT's type-0 vector is added to the position table")
    tokenizer = options.tokenizer or _own_tokenizer(path)
    added = _added_rows(text.vocab_size, tokenizer)
    if added:
        rng = np.random.default_rng(options.seed)
        rows = rng.normal(0.0, ADDED_ROW_STD, (added, text.width)).astype(np.float32)
        state[_WORDS] = np.concatenate([state[_WORDS], rows])
        names = ", ".join(ADDED_TOKENS[-added:])
        notes.append(f"rows for {names}: normal, deviation {ADDED_ROW_STD}, seed {options.seed}")

    def run(inputs: Inputs) -> Outputs:
        from flip_jax.convert import torch_models

        return torch_models.bert_outputs(source, text, inputs, keep_type=not options.as_reference)

    return Foreign(
        state=state,
        model=ModelConfig(text=dataclasses.replace(text, vocab_size=text.vocab_size + added)),
        run=run,
        tokens=text.vocab_size,
        tokenizer=tokenizer,
        notes=notes,
    )


def _gather(
    tensors: Mapping[str, np.ndarray], prefix: str, model: ModelConfig, options: Options
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    shapes = torch_flip.official_shapes(model) | {_TYPES: _type_shape(tensors, prefix, model)}
    slots = {
        name: Slot(prefix + name.removeprefix(_OFFICIAL))
        for name in shapes
        if name.startswith(_OFFICIAL) and ".crossattention." not in name
    }
    ignored = (*_HEADS, f"{prefix}pooler.*", f"{prefix}embeddings.position_ids")
    initial = InitialValues(model, options.seed)

    def fresh(name: str) -> np.ndarray:
        return np.zeros(shapes[name], np.float32) if name == _TYPES else initial(name)

    return gather(tensors, slots, shapes, options, fresh, ignored=ignored)


def _type_shape(
    tensors: Mapping[str, np.ndarray], prefix: str, model: ModelConfig
) -> tuple[int, ...]:
    name = prefix + _TYPES.removeprefix(_OFFICIAL)
    rows = len(tensors[name]) if name in tensors else 1
    return (rows, model.text.width)


def _current_name(name: str) -> str:
    for old, new in _OLD_SUFFIXES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _own_tokenizer(path: Path) -> str:
    """The vocabulary beside the weights, else the default one."""
    own = any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return str(path.resolve()) if own else DataConfig.tokenizer


def _added_rows(rows: int, name: str) -> int:
    """Number of rows to append to a table of `rows` for the vocabulary `name`.

    Raises:
      ConversionError: the vocabulary does not belong to the table.
    """
    tokenizer = Tokenizer.load(name, TextConfig.max_length)
    entries = own = tokenizer.vocab_size
    for added_id in (tokenizer.enc_id, tokenizer.dec_id):
        own -= added_id == own - 1  # at the end, where they are appended
    if rows not in (own, entries):
        raise ConversionError(
            f"the word table has {rows} rows, but the vocabulary {name!r} has {own} entries, "
            f"{entries} entries with {' and '.join(ADDED_TOKENS)}; give the one that belongs to "
            "it with --tokenizer"
        )
    return entries - rows
