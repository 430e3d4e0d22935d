"""Labellers: models that say how likely each of the 40 attributes is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flip_jax.curate.onnx_model import OnnxModel
from flip_jax.curate.stages import fingerprint
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import file_sha256

_PROBE = "probe.json"  # says all of a probe, the hash of its arrays included


class Labeller(Protocol):
    """What `AttributeStage` asks of a model. Pickles to workers; `setup` loads what does not.

    Attributes:
      size: side of the pictures that it takes, pixels; known after `setup`.
    """

    size: int

    def setup(self) -> None:
        """Called once per process, before the first pictures."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Labels pictures.

        Args:
          images: uint8 [B, size, size, 3] RGB; B is the same in every call, for the numbers of a
            picture may depend on it in their last bits.

        Returns:
          float32 [B, 40], the probability that an attribute is present, in the order of
          `flip_jax.data.attributes.ATTRIBUTES`. The same picture gives the same numbers.
        """

    def fingerprint(self) -> str:
        """Identifies what the numbers depend on besides the pictures."""


class ProbeLabeller:
    """The probe that `python -m flip_jax.downstream attributes` leaves in `OUT/probe`.

    Args:
      folder: of the probe.

    Raises:
      ValueError: no probe there.
    """

    def __init__(self, folder: str):
        self.folder = folder
        if not Path(folder, _PROBE).is_file():
            raise ValueError(
                f"config.attributes.model={folder!r} holds no {_PROBE}; name the folder `probe` of "
                "a run of `python -m flip_jax.downstream attributes`"
            )
        self._probe: Any = None

    def setup(self) -> None:
        """Loads the probe, once.

        Raises:
          ValueError: it is damaged, of another version, or of other attributes.
        """
        if self._probe is not None:
            return
        # Several workers may share a device, of which JAX would take all the memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from flip_jax.downstream.probe import load_probe

        try:
            probe = load_probe(self.folder)
        except (ValueError, OSError) as error:
            raise ValueError(f"config.attributes.model={self.folder!r}: {error}") from error
        if probe.attributes != ATTRIBUTES:
            raise ValueError(
                f"config.attributes.model={self.folder!r} knows {', '.join(probe.attributes)}; it "
                "must know the 40 attributes of CelebA in their order"
            )
        self._probe, self.size = probe, probe.image_size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._probe.probabilities(images, batch_size=len(images))

    def fingerprint(self) -> str:
        return fingerprint(file_sha256(Path(self.folder, _PROBE)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_probe": None}


class OnnxLabeller:
    """A classifier's .onnx file: pictures to 40 numbers in the order of `ATTRIBUTES`.

    Args:
      path: the file; its input is float32 [B, 3, S, S] with a fixed S.
      output: what the 40 numbers are, `probabilities` or `logits`.
      mean, std: of red, green and blue in 0..1, as in the model's training.

    Raises:
      ValueError: no such file.
      ImportError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        path: str,
        output: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        self.model = OnnxModel(path, "attributes.model")
        self.output, self.mean, self.std = output, mean, std

    def setup(self) -> None:
        """Loads the model.

        Raises:
          ValueError: its pictures have no fixed size or are not square.
        """
        self.model.setup()
        height, width = self.model.size or (0, 0)
        if not height or height != width:
            raise ValueError(
                f"config.attributes.model={self.model.path!r} takes pictures of "
                f"{f'{width} x {height} px' if height else 'any size'}; export it for square ones "
                "of a fixed size"
            )
        self.size = height

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Labeller`.

        Raises:
          ValueError: the model fails, or gives no 40 numbers or no probabilities.
        """
        mean, std = (np.array(values, np.float32) * 255 for values in (self.mean, self.std))
        inputs = ((images - mean) / std).transpose(0, 3, 1, 2)
        step = self.model.batch or len(inputs)
        found = [self._run(inputs[start : start + step]) for start in range(0, len(inputs), step)]
        return np.concatenate(found) if found else np.zeros((0, len(ATTRIBUTES)), np.float32)

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        count = len(inputs)
        if self.model.batch is not None:  # a fixed number of pictures: black ones fill the last
            inputs = np.pad(inputs, [(0, self.model.batch - count), (0, 0), (0, 0), (0, 0)])
        where = f"config.attributes.model={self.model.path!r}"
        outputs = self.model.run(inputs)
        shapes = {name: list(array.shape) for name, array in outputs.items()}
        wanted = [len(inputs), len(ATTRIBUTES)]
        matching = [array for name, array in outputs.items() if shapes[name] == wanted]
        if len(matching) != 1:
            raise ValueError(f"{where} has the outputs {shapes}; exactly one must be {wanted}")
        found = matching[0][:count].astype(np.float32)
        if self.output == "logits":
            found = 0.5 * (1 + np.tanh(0.5 * found))  # the sigmoid, without overflow
        elif not np.all((found >= 0) & (found <= 1)):
            raise ValueError(
                f"{where} gives numbers from {found.min()} to {found.max()}, no probabilities; "
                "set config.attributes.model_output=logits if that is what they are"
            )
        return found

    def fingerprint(self) -> str:
        return fingerprint(self.model.fingerprint(), self.output, self.mean, self.std)
