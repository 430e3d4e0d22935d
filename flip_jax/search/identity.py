"""Which model an index belongs to: a digest of weights, shape and vocabulary."""

from __future__ import annotations

import hashlib
import json

from flip_jax.search.index import Manifest
from flip_jax.weights import Weights, params_digest


def weights_digest(weights: Weights) -> str:
    """SHA-256 over all parameters, the sizes of the model and its vocabulary.

    The same for a checkpoint and an export of it, as both give the same embeddings.
    """
    # As stored: a field that a later release adds must not change the digest. How a model is
    # computed does not change what it is.
    model = weights.meta["config"]["model"] | {"remat": None, "dtype": None}
    about = {
        "model": model,
        "vocab_hash": weights.meta["vocab_hash"],
        "params": params_digest(weights.params),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def check_same_model(manifest: Manifest, digest: str, index: str, checkpoint: str) -> None:
    """Raises a ValueError if `digest` is not of the model that made the index."""
    if digest != manifest.checkpoint_digest:
        raise ValueError(
            f"index {index} was made by another model than {checkpoint}: digest "
            f"{manifest.checkpoint_digest[:16]} ({manifest.checkpoint}, step "
            f"{manifest.checkpoint_step}), not {digest[:16]}; give that checkpoint, or build the "
            "index again with `python -m flip_jax.search index`"
        )
