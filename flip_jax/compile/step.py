"""The train step as the training loop would run it, compiled and read, never executed."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flip_jax import partition, train
from flip_jax.compile import memory, topology
from flip_jax.compile.collectives import Collective, instructions, summed
from flip_jax.compile.hlo import Module
from flip_jax.compile.kernels import Kernel, kernels
from flip_jax.compile.topology import Chip, chip_of
from flip_jax.config import Config, MeshConfig
from flip_jax.metrics import model_flops_per_pair, peak_flops
from flip_jax.run import needs_regions
from flip_jax.visual_tokenizer.saved import tokenizer_of

# Passes of the compiler whose text is kept. The partitioned module still has every matrix product
# as such; just before libtpu makes collectives asynchronous, they are merged and in their type.
_PARTITIONED = ("after_tpu-spmd-partitioning", "after_spmd-partitioning")
_MERGED = "before_tpu_async_collective_creator"
_PASSES = "spmd-partitioning|tpu_async_collective_creator"


@dataclass(frozen=True)
class CompiledStep:
    """What is known of a step without running it; all numbers are for one chip and one step.

    Attributes:
      mesh: axis -> size. chips: their product.
      peak: FLOP/s in bfloat16, None = unknown; chip: None where it is not known.
      model_flops: by `metrics.model_flops_per_pair`.
      dot_flops: matrix products as partitioned, loops counted out, recomputation included.
      dot_bytes: of the operands and results of these.
      xla_flops: the compiler's own count, loop bodies once.
      collectives: by kind and axes; None = not known.
      heaviest: the instructions that send most.
      kernels: of a GPU, most bytes first; None = not known, as on other devices.
      unknown_loops: loops of unknown length, counted once.
      compile_seconds, host_bytes: what compiling took; peak of this process.
      hlo: text of the module that `collectives` are read from.
    """

    device_kind: str
    mesh: dict[str, int]
    slices: int
    peak: float | None
    chip: Chip | None
    memory: memory.Memory
    advice: Sequence[str]
    model_flops: float
    dot_flops: float | None = None
    dot_bytes: float | None = None
    xla_flops: float | None = None
    collectives: Sequence[Collective] | None = None
    heaviest: Sequence[Collective] = ()
    kernels: Sequence[Kernel] | None = None
    unknown_loops: int = 0
    compile_seconds: float | None = None
    host_bytes: float | None = None
    hlo: str | None = None

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())


def abstract_batch(cfg: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What `run.Run.to_devices` makes of a batch, without data."""
    rows, tokens = cfg.data.batch_size, cfg.model.text.max_length
    side, sharding = cfg.model.vision.image_size, partition.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids, mask = array((rows, tokens), jnp.int32), array((rows, tokens), jnp.bool_)
    whole = cfg.data.contrastive_text == "caption"
    part = {} if whole else {"part_ids": ids, "part_mask": mask}
    if needs_regions(cfg):
        part["regions"] = array((rows, cfg.model.vision.patches), jnp.uint32)
    return part | {
        "image": array((rows, side, side, 3), jnp.uint8),
        "token_ids": ids,
        "token_mask": mask,
        "group": array((rows,), jnp.int32),
    }


def abstract_tokenizer(cfg: Config, mesh: jax.sharding.Mesh) -> Any:
    """The visual tokenizer of the step, or None; its folder is read for the sizes."""
    found = tokenizer_of(cfg)
    shapes = jax.eval_shape(lambda: found[0]) if found else None
    return partition.replicated(shapes, mesh)


def compile_step(
    cfg: Config, devices: Sequence[Any], slices: int, steps_per_epoch: int, steps: int
) -> CompiledStep:
    """Compiles the step for `devices`, in seconds to minutes; a state that is too large is not.

    Args:
      devices: of `topology.devices`; `slices` equal stretches of them are apart.
      steps_per_epoch, steps: of the run; the schedules hold them as constants.

    Raises:
      ValueError: mesh or batch do not fit the devices.
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    mesh = partition.make_mesh(cfg.mesh, devices)
    rows = cfg.data.batch_size
    if rows % mesh.size:
        near = [n for n in (rows // mesh.size, rows // mesh.size + 1) if n]
        raise ValueError(
            f"config.data.batch_size={rows}: must be a multiple of the {mesh.size} devices, for "
            f"example {' or '.join(str(n * mesh.size) for n in near)}; --pairs-per-chip "
            f"{' or '.join(map(str, near))} sets it, with the queue"
        )
    if len(devices) // slices % cfg.mesh.fsdp:
        raise ValueError(
            f"config.mesh.fsdp={cfg.mesh.fsdp}: must divide the {len(devices) // slices} chips of "
            "a slice, so that only mesh.data runs over the network between slices"
        )
    device = devices[0]
    chip = chip_of(device)
    capacity = _capacity(device) if topology.is_here(device) else chip and chip.hbm_bytes
    compiled = train.Compiled(cfg, mesh, steps_per_epoch, steps)
    inputs = abstract_batch(cfg, mesh), abstract_tokenizer(cfg, mesh)
    step = CompiledStep(
        device_kind=device.device_kind,
        mesh=dict(mesh.shape),
        slices=slices,
        peak=peak_flops(device),
        chip=chip,
        memory=memory.without_temporaries(memory.parts_of(compiled.target, inputs), capacity),
        advice=(),
        model_flops=model_flops_per_pair(cfg) * rows / mesh.size,
    )
    if step.memory.fits is not False:
        step = _compile(step, compiled, inputs, *topology.target(device))
    if step.memory.fits is False:
        sizes = _state_sizes(compiled.target, inputs, devices, slices)
        lines = memory.advice(cfg, step.memory, step.chips, sizes)
        step = dataclasses.replace(step, advice=lines)
    return step


def _state_sizes(state: Any, inputs: Any, devices: Sequence[Any], slices: int) -> dict[int, float]:
    """`mesh.fsdp` -> bytes of state and batch on one chip, for each size that is possible."""
    sizes, in_slice = {}, len(devices) // slices
    for fsdp in (n for n in range(1, in_slice + 1) if in_slice % n == 0):
        mesh = partition.make_mesh(MeshConfig(fsdp=fsdp), devices)
        cut = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            state,
            partition.state_shardings(state, mesh),
        )
        sizes[fsdp] = sum(memory.parts_of(cut, inputs).values())
    return sizes


def _compile(
    step: CompiledStep,
    compiled: train.Compiled,
    inputs: tuple[Any, ...],
    platforms: tuple[str, ...] | None,
    options: dict[str, Any],
) -> CompiledStep:
    """`inputs` of the step beside the state; `platforms` and `options` as `topology.target`."""
    parts, capacity = step.memory.parts, step.memory.capacity
    on_gpu, on_tpu = (step.device_kind.startswith(name) for name in ("NVIDIA", "TPU"))
    start = time.perf_counter()
    traced = compiled.step.trace(compiled.target, *inputs)
    lowered = traced.lower(lowering_platforms=platforms)
    # The compiler's reports tell more than its result, and some of it even when it fails.
    with tempfile.TemporaryDirectory(prefix="flip_jax_compile_") as dump:
        options |= {
            "xla_dump_to": dump,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_pass_re": _PASSES,
        }
        program, xla_flops = None, None
        try:
            program = lowered.compile(compiler_options=options)
            used = memory.of_program(parts, program, capacity, dump, whole=not on_tpu)
            xla_flops = (program.cost_analysis() or {}).get("flops")
        except jax.errors.JaxRuntimeError as error:
            used = memory.of_failure(parts, str(error), capacity, dump)
            if used is None:
                raise
        seconds = time.perf_counter() - start
        partitioned = _dumped(dump, *_PARTITIONED)
        merged = _dumped(dump, _MERGED)
    if partitioned is None and step.chips == 1:  # then there is nothing to partition
        partitioned = lowered.as_text(dialect="hlo")
    if merged is None and program is not None:
        merged = program.as_text()
    in_slice = step.mesh | {"data": step.mesh["data"] // step.slices}
    products = None if partitioned is None else Module(partitioned)
    exchanges = None if merged is None else Module(merged)
    exchanged = exchanges and instructions(exchanges, in_slice, step.slices)
    return dataclasses.replace(
        step,
        memory=used,
        dot_flops=products and products.dot_flops(),
        dot_bytes=products and products.dot_bytes(),
        xla_flops=xla_flops,
        collectives=None if exchanged is None else summed(exchanged),
        heaviest=(exchanged or [])[:5],
        kernels=kernels(exchanges) if exchanges and on_gpu else None,
        unknown_loops=max((len(m.unknown_loops) for m in (products, exchanges) if m), default=0),
        compile_seconds=seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        hlo=merged,
    )


def _dumped(folder: str, *stages: str) -> str | None:
    """The text of the largest module at one of the stages; small ones are for constants."""
    found = [f for stage in stages for f in glob.glob(os.path.join(folder, f"*{stage}*.txt"))]
    if not found:
        return None
    with open(max(found, key=os.path.getsize), encoding="utf-8") as file:
        return file.read()


def _capacity(device: Any) -> float | None:
    """Memory of a device that is there; None if it does not tell (a CPU)."""
    stats: Callable[[], dict | None] | None = getattr(device, "memory_stats", None)
    return ((stats() if stats else None) or {}).get("bytes_limit")
