"""The encoder of DALL-E's dVAE as a visual tokenizer: names of `transformers` and of OpenAI.

Sources: `FlavaImageCodebook` of `transformers` (alone, or as `image_codebook.*` of a FLAVA model);
the state dict of `encoder.pkl` of OpenAI's DALL-E (that file itself is a pickled module and is
refused; see `weight_files`). 8,192 codes, one for 8 x 8 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from flip_jax.convert.check import compare
from flip_jax.convert.conversion import ConversionError, whole_or_absent
from flip_jax.convert.weight_files import read_tensors
from flip_jax.models.visual_tokenizer import TokenizerConfig, VisualTokenizer, dalle_logits
from flip_jax.named_arrays import nested
from flip_jax.visual_tokenizer.saved import load_tokenizer, save_tokenizer, shapes_of

_SIZE = 64  # pixels of the pictures of the check
_PREFIX = "image_codebook."


def import_dalle(source: Path, out: Path) -> str:
    """Reads an encoder, writes the folder of a visual tokenizer, runs both on the same pictures.

    Returns:
      What was done and the error of the logits, for the user.

    Raises:
      ConversionError: the tensors do not fit, or logits or codes differ; no `out` then.
      FileExistsError: `out` is there. OSError: `source` cannot be read, `out` cannot be written.
    """
    with whole_or_absent(out) as partial:
        tensors = flava_names(read_tensors(source, under=("state_dict", "model")))
        cfg, leaves = from_flava(tensors, source)
        save_tokenizer(partial, VisualTokenizer(nested(leaves), cfg), {"source": source.name})
        tokenizer, about = load_tokenizer(partial)
        pixels = np.random.default_rng(0).random((2, _SIZE, _SIZE, 3), np.float32)
        from flip_jax.convert import torch_models

        expected = torch_models.dalle_outputs(tensors, cfg, pixels)
        found = {"logits": np.asarray(jax.jit(dalle_logits)(tokenizer, pixels))}
        table = compare(expected, found)
        codes, wanted = found["logits"].argmax(-1), expected["logits"].argmax(-1)
        if not np.array_equal(codes, wanted):
            raise ConversionError(f"{(codes != wanted).sum()} of {codes.size} codes differ")
    return "\n".join(
        [
            table,
            f"{codes.size} codes of {len(pixels)} pictures are the same",
            f"{cfg.codes} codes, digest {about['digest'][:16]}",
            f"written: {out}. A run uses it with --config.loss.mim_target=tokens "
            f"--config.loss.mim_tokenizer={out} --config.model.mim_vocab={cfg.codes}",
        ]
    )


def flava_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under `transformers`' names without prefix; of a whole model only the encoder."""
    if any(name.startswith(_PREFIX) for name in tensors):
        tensors = {n: v for n, v in tensors.items() if n.startswith(_PREFIX)}
    named = {}
    for name, value in tensors.items():
        name = re.sub(r"(group_\d+)\.block", r"\1.group.block", name.removeprefix(_PREFIX))
        name = re.sub(r"res_path\.conv", "res_path.path.conv", name)
        named[re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", name))] = value
    return named


def from_flava(
    tensors: Mapping[str, np.ndarray], source: Path
) -> tuple[TokenizerConfig, dict[str, np.ndarray]]:
    """Sizes and our arrays by name.

    Raises:
      ConversionError: listing what is missing, unexpected or misshapen.
    """
    first, last = "blocks.input.weight", "blocks.output.conv.weight"
    if absent := [name for name in (first, last) if name not in tensors]:
        raise ConversionError(
            f"{source} has no tensor {', '.join(absent)}; it has {len(tensors)}, such as "
            f"{', '.join(sorted(tensors)[:5])}. Is it the encoder of a DALL-E dVAE?"
        )
    numbers = [int(m[1]) for n in tensors if (m := re.search(r"group_1\.group\.block_(\d+)\.", n))]
    cfg = TokenizerConfig(
        kind="dalle",
        codes=len(tensors[last]),
        width=len(tensors[first]),
        blocks=max(numbers, default=1),
        code_width=0,
    )
    shapes, leaves, problems = shapes_of(cfg), {}, []
    for name, shape in shapes.items():
        theirs = _flava_name(name)
        value = tensors.get(theirs)
        if value is not None and value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        if value is None or value.shape != shape:
            problems.append(f"{theirs} is {'missing' if value is None else value.shape}")
        leaves[name] = value
    known = {_flava_name(name) for name in shapes}
    problems += [f"{name} is unexpected" for name in sorted(set(tensors) - known)]
    if problems:
        raise ConversionError(f"{source} does not fit: {'; '.join(problems)}")
    return cfg, {name: np.ascontiguousarray(value) for name, value in leaves.items()}


def _flava_name(ours: str) -> str:
    """`encoder/groups/n1/n2/convs/n3/bias` in `transformers`:

    `blocks.group_1.group.block_2.res_path.path.conv_3.bias`
    """
    _, *parts, leaf = ours.split("/")
    leaf = {"kernel": "weight", "bias": "bias"}[leaf]
    if parts == ["out"]:
        return f"blocks.output.conv.{leaf}"
    if parts == ["input"]:
        return f"blocks.input.{leaf}"
    _, group, block, *rest = parts
    module = "id_path" if rest == ["identity"] else f"res_path.path.conv_{rest[-1][1:]}"
    return f"blocks.group_{group[1:]}.group.block_{block[1:]}.{module}.{leaf}"
