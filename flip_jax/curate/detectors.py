"""Face detectors: OpenCV's cascade, and model files in ONNX."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flip_jax.curate.onnx_layouts import LAYOUTS, Candidates, Layout
from flip_jax.curate.onnx_model import OnnxModel
from flip_jax.curate.stages import fingerprint
from flip_jax.data.records import file_sha256

_CASCADE = "haarcascade_frontalface_alt2.xml"
_CASCADE_STEP = 1.1  # between two sizes of the search
_CASCADE_HITS = 3  # neighbouring windows that must agree
_CASCADE_WINDOW = 20  # pixels; what it was trained on
_MIN_SCORE = 0.5  # what a model says less of is no detection
_MAX_OVERLAP = 0.4  # intersection over union of two faces
_LARGEST_STRIDE = 32


@dataclass(frozen=True, eq=False)
class Face:
    """One detection.

    Attributes:
      box: float32 [4], x0, y0, x1, y1 in pixels of the picture; may reach beyond it.
      confidence: 0 to 1; None where the detector has none.
      landmarks: float32 [5, 2], see `Sample`; None where the detector has none.
    """

    box: np.ndarray
    confidence: float | None = None
    landmarks: np.ndarray | None = None


class Detector(ABC):
    """Finds faces. Pickles to workers; `setup` loads what does not."""

    @abstractmethod
    def setup(self) -> None:
        """Called once per process, before `detect`."""

    @abstractmethod
    def detect(self, image: np.ndarray) -> list[Face]:
        """Finds the faces of uint8 [H, W, 3] RGB, best first. The same picture gives the same."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies what a detection depends on besides the picture."""


class CascadeDetector(Detector):
    """The cascade of frontal faces that ships with OpenCV 4. Source: Viola and Jones 2001.

    It needs no download and is far weaker than a network: upright faces that look at the camera,
    boxes from brow to mouth. It has neither a confidence nor landmarks; the largest face is the
    best one.

    Args:
      side: pixels; a picture whose longer side is larger is shrunk to it first.
      smallest: pixels; faces with a smaller side are not looked for, which takes most of the time.

    Raises:
      ValueError: an OpenCV without the cascade, such as version 5.
    """

    def __init__(self, side: int, smallest: int):
        self.side, self.smallest = side, smallest
        folder = getattr(cv2.data, "haarcascades", "")
        self.path = str(Path(folder, _CASCADE))
        if not hasattr(cv2, "CascadeClassifier") or not Path(self.path).is_file():
            raise ValueError(
                "config.faces.detector='opencv' needs the cascades that OpenCV 4 ships; this is "
                f"OpenCV {cv2.__version__} without them: pip install 'opencv-python-headless<5', "
                "or use a model file with config.faces.detector=onnx"
            )
        self._cascade: Any = None

    def setup(self) -> None:
        if self._cascade is None:
            self._cascade = cv2.CascadeClassifier(self.path)

    def detect(self, image: np.ndarray) -> list[Face]:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
        scale = min(self.side / max(height, width), 1)
        if scale < 1:
            size = (max(round(width * scale), 1), max(round(height * scale), 1))
            grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        smallest = max(round(self.smallest * scale), _CASCADE_WINDOW)
        found = self._cascade.detectMultiScale(
            grey, _CASCADE_STEP, _CASCADE_HITS, minSize=(smallest, smallest)
        )
        x, y, w, h = np.reshape(found, (-1, 4)).T
        boxes = np.stack([x, y, x + w, y + h], axis=-1) / scale
        return [Face(boxes[i].astype(np.float32)) for i in np.lexsort((x, y, -w))]

    def fingerprint(self) -> str:
        return fingerprint(file_sha256(Path(self.path)), cv2.__version__, self.side, self.smallest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cascade": None}


class OnnxDetector(Detector):
    """A detector's .onnx file: SCRFD, RetinaFace or YuNet, see `onnx_layouts`.

    Args:
      path: the file.
      side: pixels; the picture is scaled to fit into a square of this side, or into the size that
        the model is fixed to, and padded with black at the right and at the bottom.

    Raises:
      ValueError: no such file.
      ImportError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str, side: int):
        self.model = OnnxModel(path, "faces.model")
        self.side = side
        self._layout: Layout | None = None

    def setup(self) -> None:
        """Loads the model and finds out its kind.

        Raises:
          ValueError: it is no detector of a known kind.
        """
        if self._layout is not None:
            return
        self.model.setup()
        side = math.ceil(self.side / _LARGEST_STRIDE) * _LARGEST_STRIDE
        self._size = self.model.size or (side, side)
        outputs = self.model.run(np.zeros((1, 3, *self._size), np.float32))
        for layout in LAYOUTS:
            if layout.fits(outputs, self._size):
                self._layout = layout
                return
        shapes = ", ".join(f"{name} {list(found.shape)}" for name, found in outputs.items())
        raise ValueError(
            f"config.faces.model={self.model.path!r} has outputs of no known detector for a "
            f"picture of {list(self._size)}: {shapes}; known: "
            f"{', '.join(layout.name for layout in LAYOUTS)}"
        )

    def detect(self, image: np.ndarray) -> list[Face]:
        canvas, scale = _letterbox(image, self._size)
        outputs = self.model.run(self._layout.prepare(canvas)[None])
        found = self._layout.decode(outputs, self._size)
        if not np.all(np.abs(found.scores - 0.5) < 0.501):
            raise ValueError(
                f"config.faces.model={self.model.path!r} gives scores from {found.scores.min()} to "
                f"{found.scores.max()}; they must be probabilities: export it with its last "
                "activation"
            )
        found = _best(found)
        points = found.landmarks
        return [
            Face(
                box=(found.boxes[i] / np.tile(scale, 2)).astype(np.float32),
                confidence=min(float(found.scores[i]), 1.0),
                landmarks=None if points is None else (points[i] / scale).astype(np.float32),
            )
            for i in range(len(found.scores))
        ]

    def fingerprint(self) -> str:
        return fingerprint(self.model.fingerprint(), self.side)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layout": None}


def _letterbox(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scales a picture to fit into (height, width), at the top left of a black one.

    Returns:
      uint8 [height, width, 3], and the factors of x and y.
    """
    height, width = image.shape[:2]
    factor = min(size[0] / height, size[1] / width)
    new_width = min(max(round(width * factor), 1), size[1])
    new_height = min(max(round(height * factor), 1), size[0])
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((*size, 3), np.uint8)
    canvas[:new_height, :new_width] = cv2.resize(image, (new_width, new_height), interpolation=how)
    return canvas, np.array([new_width / width, new_height / height])


def _best(found: Candidates) -> Candidates:
    """Leaves out what is unlikely and, of boxes that overlap, all but the likeliest."""
    likely = np.flatnonzero(found.scores > _MIN_SCORE)
    likely = likely[np.argsort(-found.scores[likely], kind="stable")]
    corners, sizes = found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]
    areas = np.prod(sizes, axis=1)
    kept = []
    while len(likely):
        best, likely = likely[0], likely[1:]
        kept.append(best)
        start = np.maximum(corners[best], corners[likely])
        end = np.minimum(found.boxes[best, 2:], found.boxes[likely, 2:])
        common = np.prod(np.maximum(end - start, 0), axis=1)
        overlap = common / (areas[best] + areas[likely] - common)
        likely = likely[overlap <= _MAX_OVERLAP]
    return Candidates(
        found.scores[kept],
        found.boxes[kept],
        None if found.landmarks is None else found.landmarks[kept],
    )
