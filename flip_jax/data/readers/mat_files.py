"""MATLAB files: variables that hold numbers or lists of strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def read_mat(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Reads variables of a .mat file of any version.

    Args:
      path: the file. Version 7.3 (HDF5) needs h5py.
      names: the variables.

    Returns:
      By name: an array in MATLAB's shape, or for a cell array of strings their list.

    Raises:
      ImportError: the file is of version 7.3 and h5py is not installed.
      ValueError: damaged, or a variable is missing.
    """
    with open(path, "rb") as file:
        read = _read_hdf5 if b"MATLAB 7.3" in file.read(128) else _read_version_5
    try:
        return read(path, names)
    except ImportError:
        raise
    except Exception as error:  # scipy and h5py raise many types for damaged files
        raise ValueError(f"{path} cannot be read: {error}; download it again") from error


def _read_version_5(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    import scipy.io  # a quarter of a second, for two data sets

    found = scipy.io.loadmat(path, variable_names=names)
    return {name: _strings(_variable(found, name)) for name in names}


def _strings(value: np.ndarray) -> np.ndarray | list[str]:
    return [str(cell.item()) for cell in value.ravel("F")] if value.dtype == object else value


def _read_hdf5(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"{path} is a MATLAB 7.3 file, which needs h5py: pip install 'flip_jax[lfwa]'"
        ) from error
    with h5py.File(path) as file:
        return {name: _from_hdf5(_variable(file, name), file) for name in names}


def _from_hdf5(variable: Any, file: Any) -> np.ndarray | list[str]:
    value = variable[()].T  # MATLAB stores columns first
    if value.dtype != object:  # references to the cells
        return value
    return ["".join(map(chr, file[cell][()].ravel())) for cell in value.ravel("F")]


def _variable(found: Any, name: str) -> Any:
    if name not in found:
        raise ValueError(f"no variable {name!r}")
    return found[name]
