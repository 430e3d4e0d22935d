"""Weight files of others: PyTorch pickles and safetensors, read without running any code."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.convert.conversion import ConversionError, import_torch

# In a Hugging Face folder, in order of preference.
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_SAVE_ADVICE = (
    "Unpickling it could run code, so it is not opened. Where you trust the file, load it once "
    "in a sandbox and save its tensors alone: torch.save(model.state_dict(), 'weights.pth')"
)
# What the unpickler raises for files that are none, or are damaged.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,  # seeking beyond the end
    EOFError,
    LookupError,
    AttributeError,
    UnicodeDecodeError,
    struct.error,  # these two of files older than torch 1.6
    AssertionError,
)


def read_tensors(path: Path, *, under: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The tensors of a .pth, .pt, .bin or .safetensors file, or of a Hugging Face folder.

    Floating-point tensors come as float32, all others as they are. Large files are mapped, not
    read: arrays may share memory with the file and must not be written to.

    Args:
      path: the file, or a folder with model.safetensors or pytorch_model.bin, sharded or not.
      under: keys of a pickled dict that may hold the tensors (`model`, `state_dict`); the first
        that is there counts, else the dict itself.

    Raises:
      FileNotFoundError: no such file, or nothing of the kind in the folder.
      ConversionError: damaged or no weight file, not a dict of tensors, or a pickle that holds
        more than tensors.
      ImportError: PyTorch is not installed.
    """
    tensors: dict[str, Any] = {}
    for file in _weight_files(path):
        if file.suffix == ".safetensors":
            tensors |= _read_safetensors(file)
        else:
            tensors |= _read_pickle(file, under)
    return {name: _float32_array(name, tensor, path) for name, tensor in tensors.items()}


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json of a Hugging Face folder; None for a file or a folder without one.

    Raises:
      ConversionError: it is no JSON object.
    """
    file = path / "config.json"
    return _read_object(file) if file.is_file() else None


def stored_heads(path: Path) -> tuple[int | None, int | None]:
    """Attention heads of image and text tower where the file is an export of ours, which says so.

    Raises:
      See `read_tensors`.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        return None, None
    content = _load_pickle(path)
    try:
        model = content["config"]["model"]
        return model["vision"]["heads"], model["text"]["heads"]
    except (KeyError, TypeError, IndexError):
        return None, None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}")
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = _read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not _all_texts(shards.values()):
                raise ConversionError(f"{index} has no weight_map, which names the files")
            return [path / shard for shard in sorted(set(shards.values()))]
    raise FileNotFoundError(f"{path} holds none of {', '.join(_FOLDER_FILES)}")


def _read_safetensors(file: Path) -> dict[str, Any]:
    import_torch()
    import safetensors
    import safetensors.torch  # not .numpy, which has no bfloat16

    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ConversionError(f"{file} is not a whole safetensors file: {error}") from error


def _load_pickle(file: Path) -> Any:
    torch = import_torch()
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files older than torch 1.6 cannot be mapped
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except _UNREADABLE as error:
        raise ConversionError(_why_unreadable(file, str(error))) from error


def _read_pickle(file: Path, under: tuple[str, ...]) -> dict[str, Any]:
    content = _load_pickle(file)
    for key in under:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{file} holds a {type(content).__name__}, not a dict of tensors")
    if not _all_texts(content):
        raise ConversionError(f"{file} holds a dict whose keys are no names of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _all_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _why_unreadable(file: Path, error: str) -> str:
    """What is wrong with a file that torch.load(weights_only=True) refuses with `error`."""
    if kind := re.search(r"GLOBAL (\S+)", error):
        return f"{file} holds more than tensors and plain values, such as {kind[1]}. {_SAVE_ADVICE}"
    if "TorchScript" in error:
        return f"{file} is a TorchScript archive, which holds code. {_SAVE_ADVICE}"
    with file.open("rb") as opened:
        start = opened.read(40)
    return f"{file} is no PyTorch file or is damaged (it begins with {start!r}); download it again"


def _float32_array(name: str, tensor: Any, path: Path) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        raise ConversionError(
            f"{path}: {name} is a {type(tensor).__name__}, not a tensor; the state dict must be "
            "the whole content or lie under the key that the format names"
        )
    tensor = tensor.detach()
    try:
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, of no device
        raise ConversionError(f"{path}: {name} is no plain array: {error}") from error
