"""Short names of paths."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def short_names(
    paths: Sequence[Sequence[str]], joint: str, taken: Collection[str] = ()
) -> list[str]:
    """The last part of each path, and as much more of it as tells them apart.

    Args:
      paths: parts of each, as `PurePath.parts`.
      joint: between parts.
      taken: what must not be a name.

    Raises:
      ValueError: the same path twice, or a path that is only `taken`.
    """
    for used in range(1, max(map(len, paths)) + 1):
        names = [joint.join(parts[-used:]) for parts in paths]
        if len(set(names)) == len(paths) and not set(taken) & set(names):
            return names
    raise ValueError("no names tell them apart; is one twice?")
