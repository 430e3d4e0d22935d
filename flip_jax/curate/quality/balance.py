"""How evenly the labels of age, gender and skin are spread, and words for what is not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flip_jax.data.attributes import ATTRIBUTE_INDEX

# Labels by which a model is most often found to fail some people. CelebA's names; Pale_Skin is the
# only one of the 40 that speaks of skin, and it says nothing of dark skin.
SUBJECTS = {"Male": "gender", "Young": "age", "Pale_Skin": "skin"}
CROSSINGS = (("Male", "Young"), ("Male", "Pale_Skin"))
_SAID = {
    ("Male", 1): "men",
    ("Male", 0): "women",
    ("Young", 1): "young people",
    ("Young", 0): "older people",
    ("Pale_Skin", 1): "people labelled pale",
    ("Pale_Skin", 0): "people not labelled pale",
}
_YOUNG = {0: "older ", 1: "young "}
_PALE = {0: " not labelled pale", 1: " labelled pale"}


@dataclass(frozen=True)
class Cell:
    """People of one label, or of two.

    Attributes:
      said: who they are, in words, as the labels have it.
      labels: the attributes and whether they are present.
      pictures: that show them.
      known: pictures for which all these labels are known.
    """

    said: str
    labels: dict[str, bool]
    pictures: int
    known: int

    @property
    def share(self) -> float | None:
        """Of the pictures with these labels known; None where there are none."""
        return self.pictures / self.known if self.known else None


def cells(labels: np.ndarray, crossed: np.ndarray) -> list[Cell]:
    """Counts people by gender, age and skin, and by two of these together.

    Args:
      labels: int64 [40, 3], pictures by unknown, absent, present.
      crossed: int64 [C, 3, 3], the same for both labels of each of `CROSSINGS`.
    """
    found = []
    for name in SUBJECTS:
        _, absent, present = labels[ATTRIBUTE_INDEX[name]].tolist()
        for value, pictures in ((1, present), (0, absent)):
            said = _SAID[name, value]
            found.append(Cell(said, {name: bool(value)}, pictures, absent + present))
    for (first, second), counts in zip(CROSSINGS, crossed, strict=True):
        known = counts[1:, 1:]
        for one in (1, 0):
            for two in (1, 0):
                who = _SAID[first, one]
                said = _YOUNG[two] + who if second == "Young" else who + _PALE[two]
                pictures = int(known[one, two])
                found.append(
                    Cell(said, {first: bool(one), second: bool(two)}, pictures, int(known.sum()))
                )
    return found


def warnings(found: list[Cell], pictures: int, min_share: float) -> list[str]:
    """Says in plain words who is hardly there, and of whom nothing is known.

    Args:
      found: as `cells` gives them.
      pictures: of the data set.
      min_share: of the pictures with the label known; a smaller one is a warning.
    """
    if not any(cell.known for cell in found):
        return [
            "No picture has a label of gender, age or skin: who is in this data set cannot be said."
        ]
    said = []
    for cell in found:
        if cell.known < pictures / 2 and len(cell.labels) == 1 and all(cell.labels.values()):
            (name,) = cell.labels
            said.append(
                f"{name} ({SUBJECTS[name]}) is known for {_percent(cell.known, pictures)} of the "
                "pictures only; the rest may be otherwise."
            )
    few: list[set[tuple[str, bool]]] = []
    for cell in found:
        labels = set(cell.labels.items())
        if not cell.known or cell.share >= min_share or any(each < labels for each in few):
            continue  # where there are few pale people, there are few pale women
        few.append(labels)
        said.append(
            f"Few {cell.said}: {_percent(cell.pictures, cell.known)} of the pictures with "
            f"{' and '.join(cell.labels)} known, under {100 * min_share:g} %. Expect a model to do "
            "worse on them."
        )
    return said


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 0.1 or not part else "less than 0.1 %"
