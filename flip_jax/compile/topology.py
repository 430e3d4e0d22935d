"""Where a step may be compiled for: TPU slices that need not be there, or the devices that are."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chip:
    """What one chip has, by its vendor's public documentation unless marked.

    Attributes:
      hbm_bytes: what the compiler lets a program use, by its own message (libtpu 0.0.42.1).
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that a chip sends over all its links: half of the figure for both
        directions; for v4 the all-reduce bandwidth of a pod over its chips.
      dcn_bandwidth: bytes/s that a chip sends to other slices: that of a pod over its chips;
        None = not published.
    """

    name: str
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None


# By the start of `device_kind`, longer starts first; peak FLOP/s are in `metrics.PEAK_FLOPS`.
# Source: the pages TPU v4, v5e, v5p and v6e of the Cloud TPU documentation.
CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 15.75 * 2**30, 819e9, 200e9, 6.4e12 / 8 / 256),
    "TPU v6 lite": Chip("TPU v6e", 31.25 * 2**30, 1638e9, 400e9, 25.6e12 / 8 / 256),
    "TPU v5": Chip("TPU v5p", 95.74 * 2**30, 2765e9, 600e9, 50e9 / 8),
    "TPU v4": Chip("TPU v4", 30.75 * 2**30, 1200e9, 1.1e15 / 4096, None),
}

# Generation -> shapes. All that can be rented of v5e and v6e; of v4 and v5p the common ones.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SHAPES = {"v4": _SOLID, "v5e": _FLAT, "v5p": _SOLID, "v6e": _FLAT}

_TPU_NAME = re.compile(r"(v4|v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)")
_CPU_NAME = re.compile(r"cpu(?::([1-9]\d*))?")


def check_name(name: str | None, slices: int) -> None:
    """Whether `name` may be compiled for here; no JAX needed.

    Args:
      name: `v5e:4x4` and the like, `cpu`, `cpu:8` (simulated devices), or None: what is there.
      slices: of this shape, joined by the data-centre network.

    Raises:
      ValueError: unknown name, slices of something else than TPU, or libtpu is not installed.
    """
    if slices < 1:
        raise ValueError(f"--slices={slices}: must be at least 1")
    if name is None or _CPU_NAME.fullmatch(name):
        if slices > 1:
            raise ValueError(f"--slices={slices}: only a TPU --topology has slices")
        return
    if not known(name):
        raise ValueError(f"--topology={name}: unknown. {known_names()}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={name}: the compiler for TPU is not installed; "
            "pip install 'flip_jax[tpu]'. No TPU is needed"
        )


def known(name: str) -> bool:
    """Whether `name` is a TPU slice; of three dimensions libtpu has the last word."""
    found = _TPU_NAME.fullmatch(name)
    return bool(found) and (SHAPES[found[1]] is not _FLAT or found[2] in _FLAT)


def known_names() -> str:
    """What `--topology` takes, in words."""
    flat = [generation for generation, shapes in SHAPES.items() if shapes is _FLAT]
    solid = [generation for generation, shapes in SHAPES.items() if shapes is _SOLID]
    return (
        f"There are {' and '.join(flat)} as {', '.join(_FLAT)}; {' and '.join(solid)} as "
        f"{', '.join(_SOLID)} and larger; cpu, cpu:N for N simulated devices. Example: v5e:4x4"
    )


def prepare(name: str | None) -> None:
    """Sets the environment for `name`; call before JAX is imported."""
    if name is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if found := _CPU_NAME.fullmatch(name):
        if found[1]:
            os.environ["JAX_NUM_CPU_DEVICES"] = found[1]
        return
    # Else libtpu looks for the TPU of this machine, and lets one process in only.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def devices(name: str | None, slices: int = 1) -> Sequence[Any]:
    """The devices of `name`; those of a TPU topology can be compiled for, not run on.

    Raises:
      ValueError: libtpu refuses the shape.
    """
    import jax
    from jax.experimental import topologies

    if name is None or _CPU_NAME.fullmatch(name):
        return jax.devices()
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    if name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={name}: {reason}. {known_names()}") from error


def chip_of(device: Any) -> Chip | None:
    """What is known of a device; None for anything but a TPU of `CHIPS`."""
    kinds = sorted(CHIPS, key=len, reverse=True)
    return next((CHIPS[kind] for kind in kinds if device.device_kind.startswith(kind)), None)
