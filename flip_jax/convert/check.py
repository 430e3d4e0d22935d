"""Proof of a conversion: outputs of source and target on the same inputs, or every bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flip_jax.config import ModelConfig
from flip_jax.convert.conversion import ConversionError
from flip_jax.models import flip
from flip_jax.named_arrays import named_leaves, nested

# Largest error of an output, as a share of the largest magnitude in it. Float32 rounding of two
# implementations stays below a fifth of it at base size; a wrong weight gives 1e-2 and more.
TOLERANCE = 5e-5
ROWS = 2

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    image: np.ndarray  # float32 [ROWS, H, W, 3], normalised
    token_ids: np.ndarray  # int32 [ROWS, S]
    token_mask: np.ndarray  # bool [ROWS, S], True = real token


def fixed_inputs(cfg: ModelConfig, tokens: int | None = None) -> Inputs:
    """Noise pictures and random tokens, the same in every process for the same sizes.

    Args:
      tokens: ids are below it; None = the size of the vocabulary.
    """
    rng = np.random.default_rng(0)
    size, length = cfg.vision.image_size, cfg.text.max_length
    token_mask = np.ones((ROWS, length), bool)
    token_mask[1, length // 2 :] = False
    return Inputs(
        image=rng.standard_normal((ROWS, size, size, 3), np.float32),
        token_ids=rng.integers(tokens or cfg.text.vocab_size, size=(ROWS, length), dtype=np.int32),
        token_mask=token_mask,
    )


def our_outputs(params: Mapping, cfg: ModelConfig, inputs: Inputs) -> Outputs:
    """What our model computes in float32 with `params`, which may be only a part of all.

    Returns:
      `image_tokens`, `image_embed`, `text_tokens`, `text_embed`, `fused_tokens`, `itm_logits`:
      those for which the parameters are there.
    """
    vision, text = "vit" in params, "bert" in params
    fused = vision and text and "cross" in params["bert"]["blocks"]
    computable = {
        "image_tokens": vision,
        "image_embed": vision and "image_proj" in params,
        "text_tokens": text,
        "text_embed": text and "text_proj" in params,
        "fused_tokens": fused,
        "itm_logits": fused and "itm_head" in params,
    }
    names = tuple(name for name, yes in computable.items() if yes)
    cfg = dataclasses.replace(cfg, dtype="float32", remat="none")
    arrays = inputs.image, inputs.token_ids, inputs.token_mask
    outputs = jax.device_get(_run(params, *arrays, cfg=cfg, names=names))
    return {name: outputs[name] for name in names}  # jit sorts them


@functools.partial(jax.jit, static_argnames=("cfg", "names"))
def _run(
    params: Mapping,
    image: jax.Array,
    token_ids: jax.Array,
    token_mask: jax.Array,
    *,
    cfg: ModelConfig,
    names: tuple[str, ...],
) -> dict[str, jax.Array]:
    shapes = jax.eval_shape(lambda: flip.init_params(cfg, 1.0, jax.random.key(0)))
    absent = {name: jnp.zeros(leaf.shape) for name, leaf in named_leaves(shapes).items()}
    model = nnx.merge(flip.build(cfg), nested(absent | named_leaves(params)))
    out = {}
    out["image_tokens"], out["image_embed"] = model.encode_image(image)
    out["text_tokens"], out["text_embed"] = model.encode_text(token_ids, token_mask)
    out["fused_tokens"] = model.bert(token_ids, token_mask, out["image_tokens"])
    out["itm_logits"] = model.itm_head(out["fused_tokens"][:, 0])
    return {name: out[name] for name in names}


def with_twins(run: Callable[[bool], Outputs], twins: bool) -> Outputs:
    """Outputs of the online weights, then those of the momentum twins as `twin/...`."""
    outputs = dict(run(False))
    if twins:
        outputs |= {f"twin/{name}": value for name, value in run(True).items()}
    return outputs


def compare(source: Outputs, target: Outputs) -> str:
    """A table of the errors per output.

    Raises:
      ConversionError: an error above `TOLERANCE` or not finite, or not the same outputs; with
        the table.
    """
    if source.keys() != target.keys() or not source:
        raise ConversionError(f"the source computes {[*source]}, the target {[*target]}")
    lines = [f"{'output':<16}{'max abs error':>16}{'relative':>12}"]
    bad = []
    for name, value in source.items():
        if value.shape != target[name].shape:
            raise ConversionError(f"{name} is {value.shape} and {target[name].shape}")
        error = np.abs(value.astype(np.float64) - target[name]).max()
        relative = error / max(np.abs(value).max(), np.finfo(np.float32).tiny)
        lines.append(f"{name:<16}{error:>16.2e}{relative:>12.2e}")
        if not relative <= TOLERANCE:  # also when it is NaN
            bad.append(name)
    table = "\n".join(lines)
    if bad:
        raise ConversionError(
            f"source and target do not compute the same: {', '.join(bad)} differ by more than "
            f"{TOLERANCE:.0e} of the largest magnitude; nothing is kept\n{table}"
        )
    return table


def compare_bits(source: Mapping, target: Mapping) -> str:
    """Says that two trees of numpy arrays are the same: names, dtypes, shapes, every bit.

    Raises:
      ConversionError: they are not; with the names.
    """
    source, target = named_leaves(source), named_leaves(target)
    bad = [
        name
        for name in sorted(source.keys() | target.keys())
        if name not in source or name not in target or not _same(source[name], target[name])
    ]
    if bad:
        raise ConversionError(f"not written as they were: {', '.join(bad)}; nothing is kept")
    return f"{len(source)} arrays, read back the same bit for bit"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
