"""Memory, time and sizes worked out by hand, for steps that no compiler has seen."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.compile import memory, report
from flip_jax.compile.collectives import Collective
from flip_jax.compile.cost import Bounds, estimate
from flip_jax.compile.kernels import Kernel
from flip_jax.compile.sizes import with_pairs_per_chip
from flip_jax.compile.step import CompiledStep
from flip_jax.compile.topology import Chip
from flip_jax.config import Config, MeshConfig, OptimConfig, validate

GIB = 2**30
CHIP = Chip("made up", 16 * GIB, hbm_bandwidth=1e12, ici_bandwidth=1e11, dcn_bandwidth=1e9)


def made_up(**changes):
    """A step with round numbers."""
    step = CompiledStep(
        device_kind="made up",
        mesh={"data": 4, "fsdp": 2},
        slices=1,
        peak=1e14,
        chip=CHIP,
        memory=memory.Memory({"params": 3e9}, 4e9, 5e9, 1e6, 9.001e9, CHIP.hbm_bytes),
        advice=(),
        model_flops=2e12,
        dot_flops=3e12,
        dot_bytes=12e9,
        collectives=[
            Collective("all-reduce", "data", 10, 4e8, 6e8),
            Collective("all-gather", "fsdp", 20, 8e8, 4e8),
        ],
        compile_seconds=60.0,
        host_bytes=3e9,
    )
    return replace(step, **changes)


def test_the_estimate_by_hand():
    found = estimate(made_up(), batch_size=80, steps=36_000, efficiency=0.5, price_per_chip_hour=2)
    assert found.compute == pytest.approx(3e12 / (0.5 * 1e14))  # 60 ms
    assert found.hbm == pytest.approx((12e9 + 2 * 4e9) / 1e12)  # 20 ms
    assert found.ici == pytest.approx(1e9 / 1e11)  # 10 ms
    assert found.dcn == 0.0
    assert found.step == Bounds(pytest.approx(0.06), pytest.approx(0.09))
    assert found.mfu == Bounds(pytest.approx(1 / 3), pytest.approx(2 / 9))
    assert found.pairs_per_second == Bounds(pytest.approx(80 / 0.06), pytest.approx(80 / 0.09))
    assert found.hours == Bounds(pytest.approx(0.6), pytest.approx(0.9))
    assert found.chip_hours.worst == pytest.approx(8 * 0.9)
    assert found.price.best == pytest.approx(8 * 0.6 * 2)


def test_the_network_between_slices_is_another():
    between = Collective("all-reduce", "slices", 1, 2e8, 2e8)
    step = made_up(slices=2, collectives=[*made_up().collectives, between])
    found = estimate(step, 80, 1)
    assert found.dcn == pytest.approx(0.2)
    assert found.ici == pytest.approx(0.01)
    assert found.step.best == pytest.approx(0.2)
    unknown = estimate(replace(step, chip=replace(CHIP, dcn_bandwidth=None)), 80, 1)
    assert unknown.dcn is None
    assert unknown.step.worst == pytest.approx(unknown.compute + 0.02 + 0.01)
    text = report.table(replace(step, chip=replace(CHIP, dcn_bandwidth=None)), unknown, "")
    assert "not published" in text and "left out" in text


def test_kernels_run_one_after_another():
    """Each takes the longer of its products, at half the peak, and its bytes."""
    made = [Kernel("wide of x", 3, 12e9, 1e12), Kernel("deep of y", 4, 2e9, 2e12)]
    step = made_up(kernels=made)
    found = estimate(step, batch_size=80, steps=1, efficiency=0.5)
    assert found.hbm == pytest.approx(14e9 / 1e12)
    assert found.kernels == pytest.approx(max(0.012, 0.02) + max(0.002, 0.04))
    assert found.step == Bounds(pytest.approx(0.06), pytest.approx(0.06 + 0.014 + 0.01))
    made[0] = Kernel("wide of x", 3, 50e9, 1e12)
    found = estimate(replace(step, kernels=made), batch_size=80, steps=1, efficiency=0.5)
    assert found.step.best == pytest.approx(0.05 + 0.04)
    assert found.step.worst == pytest.approx(0.06 + 0.052 + 0.01)
    padded = [Kernel("filled up", 1, 1e9, 9e12)]  # more products than there are in the step
    bounds = estimate(replace(step, kernels=padded), batch_size=80, steps=1, efficiency=0.5).step
    assert bounds.best == bounds.worst == pytest.approx(0.18)
    text = report.table(replace(step, kernels=made), found, "")
    assert "the 52 GB that 7 kernels read and write, at 1000 GB/s: 52 ms" in text
    assert "each the longer of the two: 90 ms" in text and "50.00 GB: 3 x wide of x" in text


@pytest.mark.parametrize("missing", ["chip", "peak", "dot_flops", "collectives"])
def test_no_estimate_of_what_is_not_known(missing):
    assert estimate(made_up(**{missing: None}), 80, 1) is None


def test_no_estimate_of_what_does_not_fit():
    step = made_up()
    too_large = replace(step.memory, total=17 * GIB)
    assert estimate(replace(step, memory=too_large), 80, 1) is None


def test_parts_are_those_of_one_device():
    mesh = partition.make_mesh(MeshConfig(fsdp=2))

    def leaf(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    state = {
        "params": {"kernel": leaf((8, 4), P(None, "fsdp")), "bias": leaf((4,), P())},
        "opt_state": (leaf((16, 8), P("fsdp")), leaf((), P(), jnp.int32)),
    }
    batch = {"image": leaf((16, 2), P(("data", "fsdp")), jnp.uint8)}
    found = memory.parts_of(state, batch)
    assert found == {"opt_state": 8 * 8 * 4 + 4, "params": 8 * 2 * 4 + 16, "batch": 4}
    assert list(found) == ["opt_state", "params", "batch"]  # largest first


def test_temporaries_in_one_piece(tmp_path):
    """What a GPU takes is all of it, whatever is used of it at any one time."""
    sizes = {"argument": 4, "output": 3, "alias": 2, "temp": 10}
    found = SimpleNamespace(
        **{f"{name}_size_in_bytes": size for name, size in sizes.items()}, peak_memory_in_bytes=13
    )
    compiled = SimpleNamespace(memory_analysis=lambda: found)
    assert memory.of_program({}, compiled, 20, str(tmp_path)).total == 13
    assert memory.of_program({}, compiled, 20, str(tmp_path), whole=True).total == 15


@pytest.mark.parametrize(
    ("message", "total", "capacity"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (23.78G) exceeds available HBM (15.75G).",
            23.78,
            15.75,
        ),
        ("... HBM usage. Used 19.41G of 15.75G hbm. Exceeded hbm capacity by 3.66G.", 19.41, 15.75),
        ("Used 512.00M of 0.25G hbm", 0.5, 0.25),
    ],
)
def test_a_program_that_is_too_large_is_numbers(tmp_path, message, total, capacity):
    found = memory.of_failure({"params": 2 * GIB / 8}, message, None, str(tmp_path))
    assert found.total == pytest.approx(total * GIB)
    assert found.capacity == pytest.approx(capacity * GIB)
    assert found.temporaries == pytest.approx((total - 0.25) * GIB)
    assert found.fits is False


def test_another_failure_is_not_about_memory(tmp_path):
    assert memory.of_failure({}, "INTERNAL: something else", None, str(tmp_path)) is None


REPORT = """Memory Space: default (color=0)
Total bytes: 15397052928 (14.34GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  607.50MiB(  5%);  607.50MiB;   8688533504;                5; 5×f32[12,60,12,65,197]
    1.14GiB(  9%);    1.10GiB;   2890022912;                5; bf16[12,20,197], 4×f32[12]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    9.00GiB(100%);    9.00GiB;            0;                2; 2×f32[12,3072,768]
"""


def test_largest_temporaries_without_arguments(tmp_path):
    (tmp_path / "module_0001.step.memory-usage-report.txt").write_text(REPORT, encoding="utf-8")
    assert memory.largest_buffers(str(tmp_path)) == [
        (pytest.approx(1.1 * GIB), "bf16[12,20,197]"),
        (607.5 * 2**20, "f32[12,60,12,65,197]"),
    ]
    assert memory.largest_buffers(str(tmp_path / "none")) == []


def test_the_peak_counts_where_the_compiler_tells_it(tmp_path):
    sizes = SimpleNamespace(
        argument_size_in_bytes=40,
        output_size_in_bytes=30,
        alias_size_in_bytes=28,
        temp_size_in_bytes=500,
        peak_memory_in_bytes=100,
    )
    program = SimpleNamespace(memory_analysis=lambda: sizes)
    found = memory.of_program({"params": 39}, program, 99, str(tmp_path))
    assert (found.arguments, found.outputs, found.temporaries, found.total) == (40, 2, 58, 100)
    assert found.fits is False
    sizes.peak_memory_in_bytes = 0
    assert memory.of_program({"params": 39}, program, None, str(tmp_path)).total == 542


def test_advice_names_fields_that_help():
    cfg = Config()
    large = memory.Memory({}, 12 * GIB, 2 * GIB, 0, 17 * GIB, 16 * GIB)
    lines = memory.advice(cfg, large, 16, {1: 12 * GIB, 2: 9 * GIB, 4: 5 * GIB, 8: 3 * GIB})
    assert lines[0].startswith("--config.mesh.fsdp=4: arguments of 5.00 instead of 12.00 GiB")
    assert any(line.startswith("--config.model.remat=dots") for line in lines)
    assert any(line.startswith("--config.optim.accum_steps=2") for line in lines)
    small = memory.Memory({}, 1 * GIB, 30 * GIB, 0, 31 * GIB, 16 * GIB)
    cfg = replace(cfg, model=replace(cfg.model, remat="full"), optim=OptimConfig(accum_steps=4))
    text = "\n".join(memory.advice(cfg, small, 16, {1: GIB, 2: GIB / 2}))
    assert "fsdp" not in text and "remat" not in text and "accum_steps=8" in text
    text = "\n".join(memory.advice(cfg, small, 32, {1: GIB}))
    assert "accum_steps" not in text  # 20 pairs per chip do not fall into 8 parts
    hopeless = memory.without_temporaries({"params": 40 * GIB}, 16 * GIB)
    assert memory.advice(cfg, hopeless, 16, {1: 40 * GIB}) == [
        "more chips, or chips with more memory"
    ]


def test_pairs_per_chip_moves_what_hangs_on_the_batch():
    cfg, notes = with_pairs_per_chip(Config(), chips=16, pairs=40)
    assert cfg == Config() and len(notes) == 1  # the reference: 640 pairs
    cfg, notes = with_pairs_per_chip(Config(), chips=256, pairs=12)
    validate(cfg)
    assert cfg.data.batch_size == 3072
    assert cfg.loss.queue_size == 20 * 3072 == 61_440
    assert cfg.loss.local_batch == 64  # 80 does not divide 3072, 64 and 96 do
    assert notes[1].startswith("config.loss.local_batch=64: 80")
    cfg, notes = with_pairs_per_chip(Config(), chips=256, pairs=320)
    validate(cfg)
    assert cfg.loss.queue_size == 81_920 and cfg.loss.local_batch == 80
    assert "config.loss.queue_size=81920: 61440" in notes[1]
    with pytest.raises(ValueError, match="--pairs-per-chip=0: must be at least 1"):
        with_pairs_per_chip(Config(), 8, 0)


def test_the_table_tells_why_nothing_was_compiled():
    parts = {"opt_state": 20.0 * GIB, "params": 10.0 * GIB}
    step = made_up(
        memory=memory.without_temporaries(parts, 16 * GIB),
        advice=["--config.mesh.fsdp=4: less"],
        dot_flops=None,
        collectives=None,
    )
    text = report.table(step, None, "")
    assert "30.00  of 16.00: does not fit" in text
    assert "not compiled" in text and "--config.mesh.fsdp=4" in text
