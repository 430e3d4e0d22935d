"""NVIDIA GPUs that need not be there: what their compiler has to be told of them.

XLA compiles for a GPU from a description of it, a `GpuTargetConfigProto` in text form, where it
would else ask the driver.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One model, by its vendor's data sheet and CUDA programming guide.

    Attributes:
      device_kind: how the driver names it.
      capability: compute capability.
      memory: bytes, as `nvidia-smi` lists them.
      bandwidth: of the memory, bytes/s.
      cores: multiprocessors; lanes: float32 lanes of each.
      shared_memory: bytes of a multiprocessor; 1 KiB less is the most that one block may take.
      l2_cache: bytes; clock: GHz.
    """

    device_kind: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    cores: int
    lanes: int
    shared_memory: int
    l2_cache: int
    clock: float


# Which kernels are best is tried out on a GPU. Without one XLA would take all products for Triton,
# and fail at those that none of its kernels fits.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}

_MIB = 2**20
_H100 = Gpu(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    81_559 * _MIB,
    3.35e12,
    cores=132,
    lanes=128,
    shared_memory=228 * 2**10,
    l2_cache=50 * _MIB,
    clock=1.98,
)
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        81_920 * _MIB,
        2.039e12,
        cores=108,
        lanes=64,
        shared_memory=164 * 2**10,
        l2_cache=40 * _MIB,
        clock=1.41,
    ),
    "h100": _H100,
    # The same processor with more memory.
    "h200": replace(_H100, device_kind="NVIDIA H200", memory=143_771 * _MIB, bandwidth=4.8e12),
}


def plugin() -> str | None:
    """The version of CUDA that JAX's compiler for GPUs is installed for, `12` say; None: it is
    not."""
    for cuda in ("12", "13"):
        if importlib.util.find_spec(f"jax_cuda{cuda}_plugin") is not None:
            return cuda
    return None


def devices(name: str, count: int) -> Sequence[Any]:
    """`count` GPUs of `GPUS[name]` in one node, to compile for.

    Raises:
      ValueError: CUDA or cuDNN are not installed beside the compiler.
      jax.errors.JaxRuntimeError: the compiler refuses them.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x1x{count}",
        target_config=_target_config(GPUS[name]),
    ).devices


def _target_config(gpu: Gpu) -> str:
    cuda, cudnn = _version("runtime"), _version("cudnn")
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.bandwidth:.0f}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: {cuda[0]} minor: {cuda[1]} patch: {cuda[2]} }}
device_description_str: "{gpu.device_kind}"
"""


def _version(part: str) -> tuple[int, ...]:
    """Of what is installed beside the compiler: CUDA's `runtime`, or `cudnn`."""
    cuda = plugin()
    runtime = "nvidia-cuda-runtime" + (f"-cu{cuda}" if cuda == "12" else "")
    package = runtime if part == "runtime" else f"nvidia-cudnn-cu{cuda}"
    try:
        return tuple(int(number) for number in metadata.version(package).split(".")[:3])
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{package} is not installed beside jax_cuda{cuda}_plugin; "
            f"pip install 'jax[cuda{cuda}]=={metadata.version('jax')}'"
        ) from None
