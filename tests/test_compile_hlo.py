"""Reading compiled programs: matrix products, loop lengths and collectives of known programs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.compile.collectives import Collective, groups, instructions, summed
from flip_jax.compile.hlo import Module
from flip_jax.config import MeshConfig

SHAPE = {"data": 4, "fsdp": 2}


def collectives(module, shape, slices=1):
    return summed(instructions(module, shape, slices))


@pytest.fixture(scope="module")
def mesh():
    return partition.make_mesh(MeshConfig(fsdp=2))


def lowered(function, *arguments):
    """The module before the compiler changes it, where a product is a product."""
    return Module(jax.jit(function).lower(*arguments).as_text(dialect="hlo"))


def test_matrix_products_in_nested_loops():
    def inner(x, _):
        return jnp.tanh(x @ x), None  # [4, 4] @ [4, 4]

    def outer(x, w):
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return x @ w, None

    def function(x, weights, wide):
        x, _ = jax.lax.scan(outer, x, weights)
        return x, jnp.einsum("bij,bjk->bik", wide, wide)

    arguments = jnp.ones((4, 4)), jnp.ones((5, 4, 4)), jnp.ones((7, 6, 6), jnp.bfloat16)
    module = lowered(function, *arguments)
    small, large = 2 * 4**3, 7 * 2 * 6**3
    assert module.dot_flops() == 5 * 3 * small + 5 * small + large
    assert module.dot_bytes() == 20 * 3 * 16 * 4 + 3 * 7 * 36 * 2
    assert not module.unknown_loops


def test_products_agree_with_the_compilers_count_of_unrolled_loops():
    weights = jnp.ones((6, 32, 32))

    def scanned(x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    def unrolled(x):
        for w in weights:
            x = x @ w
        return x

    x = jnp.ones((8, 32))
    cost = jax.jit(unrolled).lower(x).compile().cost_analysis()
    assert lowered(scanned, x).dot_flops() == cost["flops"] == 6 * 2 * 8 * 32 * 32


@pytest.mark.parametrize(
    ("start", "stop", "step", "rounds"), [(0, 5, 1, 5), (3, 10, 2, 4), (2, 2, 1, 0), (-4, 9, 5, 3)]
)
def test_loop_lengths(start, stop, step, rounds):
    def function(x):
        def body(carry):
            return carry[0] + step, carry[1] @ carry[1]

        return jax.lax.while_loop(lambda carry: carry[0] < stop, body, (start, x))[1]

    assert lowered(function, jnp.ones((2, 2))).dot_flops() == rounds * 2 * 2**3


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    module = lowered(function, jnp.ones((2, 2)))
    assert module.dot_flops() == 2 * 2**3
    assert len(module.unknown_loops) == 1


def test_what_a_loop_of_unknown_length_exchanges_is_marked(mesh):
    def function(x):
        total = jax.lax.psum(x, "data")
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: jax.lax.psum(x, "data"), total)

    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((4, 2))).compile().as_text()
    inside, outside = sorted(collectives(Module(text), SHAPE), key=lambda c: not c.per_round)
    assert inside == replace(outside, per_round=True)
    assert outside == Collective("all-reduce", "data", 1, 8.0, 12.0)


def test_the_stop_may_be_the_compilers_own_note():
    text = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: x @ x, x)).lower(
        jnp.ones((64, 64))
    )
    compiled = text.compile().as_text()
    assert "known_trip_count" in compiled
    assert not Module(compiled).unknown_loops


def exchanged(mesh, function, *shapes, rounds=1):
    """Collectives of a per-device function, executed `rounds` times in a loop."""

    def repeated(*arguments):
        def body(carry, _):
            return jax.tree.map(lambda x: x * 2, carry), function(*carry)

        return jax.lax.scan(body, arguments, None, length=rounds)[1]

    everywhere = P(mesh.axis_names)
    specs = tuple(everywhere for _ in shapes)
    mapped = jax.shard_map(
        repeated, mesh=mesh, in_specs=specs, out_specs=P(None, mesh.axis_names), check_vma=False
    )
    sharding = NamedSharding(mesh, everywhere)
    inputs = [
        jax.ShapeDtypeStruct((8 * s[0], *s[1:]), jnp.float32, sharding=sharding) for s in shapes
    ]
    return collectives(Module(jax.jit(mapped).lower(*inputs).compile().as_text()), SHAPE)


@pytest.mark.parametrize(("axes", "size"), [(("data",), 4), (("fsdp",), 2), (("data", "fsdp"), 8)])
def test_kinds_axes_and_bytes(mesh, axes, size):
    over, put_in = "+".join(axes), 16 * 4 * 3.0  # bytes of float32 [16, 3] on each device

    def only(function, rounds):
        (found,) = exchanged(mesh, function, (16, 3), rounds=rounds)
        return found

    assert only(lambda x: jax.lax.psum(x, axes), 5) == Collective(
        "all-reduce", over, 5, 5 * put_in, 5 * 2 * (size - 1) / size * put_in
    )
    assert only(lambda x: jax.lax.all_gather(x, axes), 3) == Collective(
        "all-gather", over, 3, 3 * put_in * size, 3 * (size - 1) * put_in
    )
    scatter = only(lambda x: jax.lax.psum_scatter(x, axes, tiled=True), 2)
    assert scatter == Collective(
        "reduce-scatter", over, 2, 2 * put_in, 2 * (size - 1) / size * put_in
    )


def test_exchanges_between_pairs(mesh):
    ring = [(n, (n + 1) % 4) for n in range(4)]
    (shifted,) = exchanged(mesh, lambda x: jax.lax.ppermute(x, "data", ring), (4, 4), rounds=4)
    assert shifted == Collective("collective-permute", "data", 4, 4 * 64.0, 4 * 64.0)
    (swapped,) = exchanged(mesh, lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), (4, 4))
    assert swapped.kind == "all-to-all" and swapped.axes == "fsdp" and swapped.sent_bytes == 32.0


def test_single_instructions_name_their_source(mesh):
    def function(x):
        with jax.named_scope("tower"):
            return jax.lax.psum(x, "data"), jax.lax.all_gather(x, "fsdp")

    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")), check_vma=False
    )
    compiled = jax.jit(mapped).lower(jnp.ones((16, 64))).compile()
    first, second = instructions(Module(compiled.as_text()), SHAPE)
    assert first.kind == "all-reduce" and first.sent_bytes > second.sent_bytes
    assert first.what.startswith("f32[4,64], ") and "tower/psum" in first.what
    assert second.kind == "all-gather" and second.what.startswith("f32[2,4,64], ")


def test_a_group_of_one_exchanges_nothing():
    mesh = partition.make_mesh(MeshConfig(fsdp=1))
    function = jax.shard_map(
        lambda x: jax.lax.psum(x, "fsdp"), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    text = jax.jit(function).lower(jnp.ones((8, 2))).compile().as_text()
    assert collectives(Module(text), {"data": 8, "fsdp": 1}) == []


def test_the_partitioners_own_gradients(mesh):
    """A data-parallel gradient is one all-reduce of the parameters."""

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=partition.batch_sharding(mesh))
    step = jax.jit(jax.grad(loss), out_shardings=w.sharding)
    (found,) = collectives(Module(step.lower(w, x).compile().as_text()), SHAPE)
    assert found == Collective("all-reduce", "data+fsdp", 1, 2048.0, 2 * 7 / 8 * 2048.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [list(range(8))]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("source_target_pairs={{0,7},{1,0}}", [[0, 7], [1, 0]]),
        (
            "replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", [list(range(8))]),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}, x=1",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_groups(text, expected):
    found = groups(f"channel_id=1, {text}", 8)
    assert sorted(sorted(row) for row in found.tolist()) == sorted(sorted(r) for r in expected)


def test_groups_agree_with_a_run(mesh):
    """What the text says sums up is what a run sums up."""
    function = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"),
        mesh=mesh,
        in_specs=P(("data", "fsdp")),
        out_specs=P("fsdp"),
    )
    x = np.arange(8.0)
    compiled = jax.jit(function).lower(x).compile()
    (one,) = [i for _, i, _ in Module(compiled.as_text()).executed() if i.op == "all-reduce"]
    sums = sorted(x[row].sum() for row in groups(one.attributes, 8))
    assert sums == sorted(np.asarray(compiled(x)).tolist())


def test_a_kernels_call_over_several_lines():
    """As libtpu writes it; the lines in between start like the end of a computation."""
    text = """
%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4] get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %kernel = f32[4] custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="attention"}
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[4]) tuple(%next, %kernel)
}

%condition (state: (s32[], f32[4])) -> pred[] {
  %state = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stop = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %stop), direction=LT
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[4]) while(%start), condition=%condition, body=%body
}
"""
    module = Module(text)
    assert {i.name: times for _, i, times in module.executed()}["kernel"] == 12
    assert not module.unknown_loops


def test_unreadable_text():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("nothing")
    with pytest.raises(ValueError, match="cannot read the groups"):
        groups("replica_groups=new", 8)


SLICES = """HloModule two_slices
ENTRY %main (x: f32[8,2]) -> f32[8,2] {
  %x = f32[8,2]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8,2], u32[], token[]) send(%x, %t), is_host_transfer=true, frontend_attributes={KIND}
  %sd = token[] send-done(%s)
  ROOT %r = f32[8,2]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_what_goes_between_slices():
    kind = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    module = Module(SLICES.replace("KIND", kind))
    found = collectives(module, {"data": 2, "fsdp": 2}, slices=2)
    assert found == [
        Collective("all-reduce", "data+fsdp", 1, 64.0, 96.0),
        Collective("all-reduce", "slices", 1, 64.0, 64.0),
    ]
