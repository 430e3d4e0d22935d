"""No work on padding: the texts of a batch are cut to one of a few lengths; no jax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Ids and mask of a text, by their names in a batch.
_TEXTS = (("token_ids", "token_mask"), ("part_ids", "part_mask"))


def crop_texts(
    batch: dict[str, np.ndarray], buckets: Sequence[int], gather: Callable[[Any], list[Any]]
) -> dict[str, np.ndarray]:
    """Cuts off columns that are padding in all rows of the batch.

    What is left has the first length of `buckets` that holds the longest text, so that a step is
    compiled for few shapes; longer texts keep all columns. Nothing that a model computes of real
    tokens changes but the random numbers of dropout, whose shape they depend on.

    Args:
      batch: of one host; `token_ids`, `part_ids` (if there) int32 [b, L], their masks bool [b, L],
        True first in every row.
      buckets: ascending lengths, tokens; none = nothing is cut.
      gather: JSON value of this host -> those of all hosts, which must agree on the shapes.
    """
    if not buckets:
        return batch
    texts = [names for names in _TEXTS if names[0] in batch]
    longest = [int(batch[mask].sum(axis=1).max()) for _, mask in texts]
    cropped = dict(batch)
    for names, *lengths in zip(texts, *gather(longest), strict=True):
        width = next((bucket for bucket in buckets if bucket >= max(lengths)), None)
        for name in names:
            cropped[name] = batch[name][:, :width]
    return cropped
