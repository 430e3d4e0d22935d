"""Attribute filters: which faces of an index a search may return; no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from flip_jax.data.attributes import ATTRIBUTE_INDEX, UNKNOWN

State = Literal["yes", "no", "unknown"]
STATES: dict[str, int] = {"yes": 1, "no": 0, "unknown": UNKNOWN}


def allowed_faces(attributes: np.ndarray, filters: Mapping[str, State]) -> np.ndarray | None:
    """Faces that meet all filters.

    Args:
      attributes: int8 [40, N]; 1 present, 0 absent, -1 unknown.
      filters: state wanted of each attribute named; `no` is not met where it is unknown.

    Returns:
      bool [N]; None if there is no filter.

    Raises:
      ValueError: an attribute or a state that does not exist.
    """
    allowed = None
    for name, state in filters.items():
        if name not in ATTRIBUTE_INDEX:
            raise ValueError(f"filter {name!r}: not one of the 40 attributes of CelebA")
        if state not in STATES:
            raise ValueError(f"filter {name}={state!r}: allowed are {', '.join(STATES)}")
        meets = attributes[ATTRIBUTE_INDEX[name]] == STATES[state]
        allowed = meets if allowed is None else allowed & meets
    return allowed
