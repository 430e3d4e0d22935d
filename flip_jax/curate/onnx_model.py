"""Model files in ONNX that a user supplies, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.data.records import file_sha256


class OnnxModel:
    """A model with one picture input [B, 3, H, W] float32. Pickles as its path.

    Args:
      path: .onnx file.
      field: the setting it comes from, for messages.

    Raises:
      ValueError: no such file.
      ImportError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str, field: str):
        self.path, self.field = path, field
        if not Path(path).is_file():
            raise ValueError(
                f"config.{field}={path!r} is not a file; name the .onnx file of a model"
            )
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"config.{field}={path!r} needs ONNX Runtime: pip install 'flip_jax[curate]'"
            ) from error
        self._session: Any = None

    def setup(self) -> None:
        """Loads the model, once.

        Raises:
          ValueError: the file is no model, or its input is no picture.
        """
        if self._session is not None:
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # workers supply the parallelism
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        available = onnxruntime.get_available_providers()
        providers = [name for name in wanted if name in available]
        try:
            session = onnxruntime.InferenceSession(self.path, options, providers=providers)
        except Exception as error:  # its errors share no base class
            raise ValueError(f"config.{self.field}={self.path!r} does not load: {error}") from error
        inputs = session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(shape) != 4:
            found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise ValueError(
                f"config.{self.field}={self.path!r} has the inputs {found}; it must have one, "
                "float32 [B, 3, H, W]"
            )
        if isinstance(shape[1], int) and shape[1] != 3:
            raise ValueError(
                f"config.{self.field}={self.path!r} takes {shape[1]} channels, must be 3"
            )
        self._session, self._input = session, inputs[0].name
        self._shape = shape

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that the model takes, in pixels; None = any."""
        height, width = self._shape[2:]
        fixed = isinstance(height, int) and isinstance(width, int)
        return (height, width) if fixed else None

    @property
    def batch(self) -> int | None:
        """How many pictures the model takes at a time; None = any number."""
        return self._shape[0] if isinstance(self._shape[0], int) else None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs for float32 [B, 3, H, W], by name, in the model's order.

        Raises:
          ValueError: the model fails.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            found = self._session.run(names, {self._input: np.ascontiguousarray(images)})
        except Exception as error:
            raise ValueError(
                f"config.{self.field}={self.path!r} fails on {list(images.shape)}: {error}"
            ) from error
        return dict(zip(names, found, strict=True))

    def fingerprint(self) -> str:
        return file_sha256(Path(self.path))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "field": self.field, "_session": None}
