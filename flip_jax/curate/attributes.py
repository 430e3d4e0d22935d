"""Labels of crops: those of the input, or those of a labeller."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flip_jax.curate.config import AttributesConfig
from flip_jax.curate.labeller import Labeller, OnnxLabeller, ProbeLabeller
from flip_jax.curate.stages import Sample, Stage, Tally, fingerprint
from flip_jax.data.attributes import ATTRIBUTES, UNKNOWN
from flip_jax.data.transforms import BadImage, decode_image, resize_image


class AttributeStage(Stage):
    """Fills `attributes` and, where the labeller or the input has them, `probabilities`.

    Drops: `undecodable`, `no labels`, `few labels`.

    Args:
      cfg: settings.
      labeller: instead of the one that `cfg` names.

    Raises:
      ValueError: the model is not there.
      ImportError: its library is not installed.
    """

    name = "attributes"

    def __init__(self, cfg: AttributesConfig, labeller: Labeller | None = None):
        super().__init__(cfg)
        if labeller is None and cfg.labeller == "probe":
            labeller = ProbeLabeller(cfg.model)
        elif labeller is None and cfg.labeller == "onnx":
            labeller = OnnxLabeller(cfg.model, cfg.model_output, cfg.image_mean, cfg.image_std)
        self.labeller = labeller

    def setup(self) -> None:
        if self.labeller is not None:
            self.labeller.setup()

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        labelled = self._labelled(batch, tally)
        kept = []
        for sample in labelled:
            labels = sample.attributes
            present = 0 if labels is None else int(np.sum(labels == 1))
            if present > self.cfg.min_labels:
                kept.append(sample)
            elif labels is None:
                tally.drop(self.name, sample, "no labels")
            else:
                tally.drop(self.name, sample, "few labels", f"{present} present")
        return kept

    def _labelled(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        if self.labeller is None:
            return [self._given(sample) for sample in batch]
        found: list[Sample] = []
        for start in range(0, len(batch), self.cfg.batch_size):
            found += self._label(batch[start : start + self.cfg.batch_size], tally)
        return found

    def _given(self, sample: Sample) -> Sample:
        if sample.probabilities is None:
            return sample
        labels = labels_from_probabilities(sample.probabilities, self.cfg.min_probability)
        if sample.attributes is not None:
            labels = np.where(np.isnan(sample.probabilities), sample.attributes, labels)
        return dataclasses.replace(sample, attributes=labels.astype(np.int8))

    def _label(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        samples, images = [], []
        for sample in batch:
            try:
                images.append(resize_image(decode_image(sample.image), self.labeller.size))
            except BadImage as error:
                tally.drop(self.name, sample, "undecodable", str(error))
                continue
            samples.append(sample)
        if not samples:
            return []
        # Always so many at a time: what is said of a picture must not depend on those beside it.
        images += [images[-1]] * (self.cfg.batch_size - len(images))
        probabilities = self.labeller(np.stack(images))[: len(samples)]
        labels = labels_from_probabilities(probabilities, self.cfg.min_probability)
        return [
            dataclasses.replace(sample, attributes=row, probabilities=row_probabilities)
            for sample, row, row_probabilities in zip(samples, labels, probabilities, strict=True)
        ]

    def fingerprint(self) -> str:
        cfg = self.cfg
        found = None if self.labeller is None else self.labeller.fingerprint()
        filters = (cfg.min_probability, cfg.min_labels)
        batch = None if self.labeller is None else cfg.batch_size
        return fingerprint(self.name, self.version, *filters, batch, found)


def labels_from_probabilities(probabilities: np.ndarray, min_probability: float) -> np.ndarray:
    """Keeps the labels that are likely enough.

    Args:
      probabilities: float [..., 40], that an attribute is present; NaN = not known.
      min_probability: at least 0.5.

    Returns:
      int8 [..., 40]: 1 where the probability is above `min_probability`, 0 where that of the
      opposite is, else -1.

    Raises:
      ValueError: another shape, or a number out of range.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.shape[-1:] != (len(ATTRIBUTES),):
        raise ValueError(
            f"probabilities are {list(probabilities.shape)}; the last axis must have "
            f"{len(ATTRIBUTES)} numbers"
        )
    if np.any((probabilities < 0) | (probabilities > 1)):
        raise ValueError(
            f"probabilities are from {np.nanmin(probabilities)} to {np.nanmax(probabilities)}; "
            "must be from 0 to 1"
        )
    if not 0.5 <= min_probability <= 1:
        raise ValueError(
            f"config.attributes.min_probability={min_probability}: must be from 0.5 to 1"
        )
    labels = np.full(probabilities.shape, UNKNOWN, np.int8)
    labels[probabilities > min_probability] = 1
    labels[1 - probabilities > min_probability] = 0
    return labels
