"""From pictures to crops of one face each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flip_jax.config import to_dict
from flip_jax.curate.align import Crop, crop_aligned, crop_box
from flip_jax.curate.config import FacesConfig
from flip_jax.curate.detectors import CascadeDetector, Detector, Face, OnnxDetector
from flip_jax.curate.stages import Sample, Stage, Tally, fingerprint
from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.transforms import decode_image, encode_jpeg, prepare_image


class FaceStage(Stage):
    """Finds faces, leaves out doubtful and small ones, and crops the others at their own size.

    Boxes and landmarks of the input are those of the picture as it is seen, with its EXIF
    orientation applied.

    Drops: `undecodable`, `no face`, `no box`, `low confidence`, `bad box`, `bad landmarks`,
    `too small`, `too many faces`. A picture with several faces is dropped once per face.

    Raises:
      ValueError: the detector cannot be had.
      ImportError: its library is not installed.
    """

    name = "faces"

    def __init__(self, cfg: FacesConfig):
        super().__init__(cfg)
        self.detector: Detector | None = None
        if cfg.detector == "opencv":
            self.detector = CascadeDetector(cfg.detect_side, cfg.min_side)
        elif cfg.detector == "onnx":
            self.detector = OnnxDetector(cfg.model, cfg.detect_side)

    def setup(self) -> None:
        if self.detector is not None:
            self.detector.setup()

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        kept = []
        for sample in batch:
            try:
                if self.cfg.detector == "whole":
                    kept += self._whole(sample, tally)
                else:
                    kept += self._crops(sample, tally)
            except BadImage as error:
                tally.drop(self.name, sample, "undecodable", str(error))
        return kept

    def _whole(self, sample: Sample, tally: Tally) -> list[Sample]:
        image, _ = prepare_image(sample.image, None, self.cfg.quality)
        height, width = jpeg_size(image)
        if min(height, width) <= self.cfg.min_side:
            tally.drop(self.name, sample, "too small", f"{width} x {height} px")
            return []
        return [dataclasses.replace(sample, image=image, box=None)]

    def _crops(self, sample: Sample, tally: Tally) -> list[Sample]:
        image = decode_image(sample.image)
        if self.detector is None:
            if sample.box is None:
                tally.drop(self.name, sample, "no box")
                return []
            faces = [Face(sample.box, sample.confidence, sample.landmarks)]
        else:
            faces = self.detector.detect(image)
            if not faces:
                tally.drop(self.name, sample, "no face")
        kept: list[Sample] = []
        for number, face in enumerate(faces):
            # The sample of a face carries the box in the picture until the crop replaces it.
            one = dataclasses.replace(
                sample, box=face.box, landmarks=face.landmarks, confidence=face.confidence
            )
            if self.detector is not None:
                one = dataclasses.replace(one, id=f"{sample.id}#{number}")
            if len(kept) == self.cfg.max_faces:
                tally.drop(self.name, one, "too many faces", f"more than {len(kept)}")
                continue
            try:
                crop = self._crop(image, face)
            except _Rejected as rejected:
                tally.drop(self.name, one, *rejected.args)
                continue
            kept.append(
                dataclasses.replace(
                    one,
                    image=encode_jpeg(crop.image, self.cfg.quality),
                    box=crop.box,
                    landmarks=crop.landmarks,
                )
            )
        return kept

    def _crop(self, image: np.ndarray, face: Face) -> Crop:
        cfg = self.cfg
        if face.confidence is not None and face.confidence <= cfg.min_confidence:
            raise _Rejected("low confidence", f"{face.confidence:.3f}")
        crop = crop_box(image, face.box, face.landmarks, cfg.margin)
        if crop is None:
            raise _Rejected("bad box", f"{np.asarray(face.box).tolist()} in {image.shape[:2]}")
        if cfg.align and face.landmarks is not None:
            crop = crop_aligned(image, face.box, face.landmarks, cfg.margin)
            if crop is None:
                raise _Rejected("bad landmarks", f"{np.asarray(face.landmarks).tolist()}")
        height, width = crop.image.shape[:2]
        if min(height, width) <= cfg.min_side:
            raise _Rejected("too small", f"{width} x {height} px")
        return crop

    def fingerprint(self) -> str:
        settings = to_dict(self.cfg)
        del settings["model"]  # where the file is does not matter, what is in it does
        found = None if self.detector is None else self.detector.fingerprint()
        return fingerprint(self.name, self.version, settings, found)


class _Rejected(Exception):
    """A face that cannot be used; args: reason, detail."""
