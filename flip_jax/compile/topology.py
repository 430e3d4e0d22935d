"""Where a step may be compiled for: TPU slices and nodes of GPUs that need not be there, or the
devices that are."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flip_jax.compile import gpus


@dataclass(frozen=True)
class Chip:
    """What one chip has, by its vendor's public documentation unless marked.

    Attributes:
      hbm_bytes: what a program may use: of a TPU by the compiler's own message (libtpu 0.0.42.1),
        of a GPU what JAX takes of its memory by itself, three quarters.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that a chip sends over all its links: half of the figure for both
        directions; for v4 the all-reduce bandwidth of a pod over its chips; of GPUs NVLink.
      dcn_bandwidth: bytes/s that a chip sends to other slices: that of a pod over its chips;
        None = not published, or there are none.
    """

    name: str
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None


def _gpu(name: str, nvlink: float) -> Chip:
    gpu = gpus.GPUS[name]
    return Chip(name.upper(), 0.75 * gpu.memory, gpu.bandwidth, nvlink, None)


# By the start of `device_kind`, longer starts first; peak FLOP/s are in `metrics.PEAK_FLOPS`.
# Source: the pages TPU v4, v5e, v5p and v6e of the Cloud TPU documentation; NVIDIA's data sheets of
# A100, H100 and H200 (SXM).
CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 15.75 * 2**30, 819e9, 200e9, 6.4e12 / 8 / 256),
    "TPU v6 lite": Chip("TPU v6e", 31.25 * 2**30, 1638e9, 400e9, 25.6e12 / 8 / 256),
    "TPU v5": Chip("TPU v5p", 95.74 * 2**30, 2765e9, 600e9, 50e9 / 8),
    "TPU v4": Chip("TPU v4", 30.75 * 2**30, 1200e9, 1.1e15 / 4096, None),
    gpus.GPUS["a100"].device_kind: _gpu("a100", nvlink=300e9),
    gpus.GPUS["h100"].device_kind: _gpu("h100", nvlink=450e9),
    gpus.GPUS["h200"].device_kind: _gpu("h200", nvlink=450e9),
}

# Generation -> shapes. All that can be rented of v5e and v6e; of v4 and v5p the common ones.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SHAPES = {"v4": _SOLID, "v5e": _FLAT, "v5p": _SOLID, "v6e": _FLAT}

_TPU_NAME = re.compile(r"(v4|v5e|v5p|v6e):(\d+x\d+(?:x\d+)?)")
_GPU_NAME = re.compile(rf"({'|'.join(gpus.GPUS)})(?::([1-9]\d*))?")
_CPU_NAME = re.compile(r"cpu(?::([1-9]\d*))?")


def check_name(name: str | None, slices: int) -> None:
    """Whether `name` may be compiled for here; no JAX needed.

    Args:
      name: `v5e:4x4`, `h200:8` and the like, `cpu`, `cpu:8` (simulated devices), or None: what is
        there.
      slices: of this shape, joined by the data-centre network.

    Raises:
      ValueError: unknown name, slices of something else than TPU, or the compiler is not installed.
    """
    if slices < 1:
        raise ValueError(f"--slices={slices}: must be at least 1")
    here = name is None or _CPU_NAME.fullmatch(name)
    gpu = not here and _GPU_NAME.fullmatch(name)
    if slices > 1 and (here or gpu):
        raise ValueError(f"--slices={slices}: only a TPU --topology has slices")
    if here:
        return
    if not known(name):
        raise ValueError(f"--topology={name}: unknown. {known_names()}")
    compiler = gpus.plugin() if gpu else importlib.util.find_spec("libtpu")
    if compiler is None:
        kind = "GPU" if gpu else "TPU"
        raise ValueError(
            f"--topology={name}: the compiler for {kind} is not installed; "
            f"pip install 'flip_jax[{kind.lower()}]'. No {kind} is needed"
        )


def known(name: str) -> bool:
    """Whether `name` are GPUs or a TPU slice; of three dimensions libtpu has the last word."""
    if _GPU_NAME.fullmatch(name):
        return True
    found = _TPU_NAME.fullmatch(name)
    return bool(found) and (SHAPES[found[1]] is not _FLAT or found[2] in _FLAT)


def known_names() -> str:
    """What `--topology` takes, in words."""
    flat = [generation for generation, shapes in SHAPES.items() if shapes is _FLAT]
    solid = [generation for generation, shapes in SHAPES.items() if shapes is _SOLID]
    return (
        f"There are {' and '.join(flat)} as {', '.join(_FLAT)}; {' and '.join(solid)} as "
        f"{', '.join(_SOLID)} and larger; {', '.join(gpus.GPUS)}, with :N for N of them in a node; "
        "cpu, cpu:N for N simulated devices. Example: v5e:4x4"
    )


def compiler(name: str | None) -> list[str]:
    """The packages whose compiler `name` needs, beside JAX."""
    if name is None or _CPU_NAME.fullmatch(name):
        return []
    return [f"jax-cuda{gpus.plugin()}-plugin"] if _GPU_NAME.fullmatch(name) else ["libtpu"]


def prepare(name: str | None) -> None:
    """Sets the environment for `name`; call before JAX is imported."""
    if name is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if found := _CPU_NAME.fullmatch(name):
        if found[1]:
            os.environ["JAX_NUM_CPU_DEVICES"] = found[1]
        return
    if _GPU_NAME.fullmatch(name):
        return
    # Else libtpu looks for the TPU of this machine, and lets one process in only.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def devices(name: str | None, slices: int = 1) -> Sequence[Any]:
    """The devices of `name`; those of a topology can be compiled for, not run on.

    Raises:
      ValueError: the compiler refuses the shape.
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
        if found := _GPU_NAME.fullmatch(name):
            return gpus.devices(found[1], int(found[2] or 1))
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={name}: {reason}. {known_names()}") from error


def target(device: Any) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """(Platforms to lower for, None = that of the devices here; options of the compiler)."""
    if is_here(device):
        return None, {}
    if device.platform == "gpu":
        return ("cuda",), dict(gpus.OPTIONS)
    return (device.platform,), {}


def is_here(device: Any) -> bool:
    """Whether a program can run on it."""
    import jax

    return any(device is one for one in jax.devices())


def chip_of(device: Any) -> Chip | None:
    """What is known of a device; None for what is not in `CHIPS`."""
    kinds = sorted(CHIPS, key=len, reverse=True)
    return next((CHIPS[kind] for kind in kinds if device.device_kind.startswith(kind)), None)
