"""What kernels of a program for GPUs read, write and multiply, of a text in the compiler's form."""

import pytest

from flip_jax.compile.hlo import Module
from flip_jax.compile.kernels import Kernel, kernels

# A loop of three rounds over a stack of five: each multiplies a row block by the weights of its
# layer, adds to it, keeps it in a stack, and sums up what came before.
TEXT = """
HloModule jit_step, is_scheduled=true

%fused_slice (param_0.1: f32[5,16,32], param_1.1: s32[]) -> bf16[16,32] {
  %param_0.1 = f32[5,16,32]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %bitcast.1 = f32[5,512]{1,0} bitcast(%param_0.1)
  %slice.1 = f32[1,512]{1,0} dynamic-slice(%bitcast.1, %param_1.1, %zero.1), dynamic_slice_sizes={1,512}
  %bitcast.2 = f32[16,32]{1,0} bitcast(%slice.1)
  ROOT %convert.1 = bf16[16,32]{1,0} convert(%bitcast.2)
}

%fused_update (param_0.2: f32[5,8,32], param_1.2: f32[8,32], param_2.2: s32[]) -> (f32[5,8,32], f32[8]) {
  %param_0.2 = f32[5,8,32]{2,1,0} parameter(0)
  %param_1.2 = f32[8,32]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %bitcast.3 = f32[1,8,32]{2,1,0} bitcast(%param_1.2)
  %update.2 = f32[5,8,32]{2,1,0} dynamic-update-slice(%param_0.2, %bitcast.3, %param_2.2, %zero.2, %zero.2)
  %sum.2 = f32[8]{0} reduce(%param_1.2, %zero.2), dimensions={1}, to_apply=%add
  ROOT %tuple.2 = (f32[5,8,32]{2,1,0}, f32[8]{0}) tuple(%update.2, %sum.2)
}

%fused_product (param_0.3: bf16[8,32], param_1.3: bf16[32,4]) -> bf16[8,4] {
  %param_0.3 = bf16[8,32]{1,0} parameter(0)
  %param_1.3 = bf16[32,4]{1,0} parameter(1)
  ROOT %dot.3 = bf16[8,4]{1,0} dot(%param_0.3, %param_1.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[5,16,32], f32[5,8,32], bf16[8,16])) -> (s32[], f32[5,16,32], f32[5,8,32], bf16[8,16]) {
  %state = (s32[], f32[5,16,32]{2,1,0}, f32[5,8,32]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = f32[5,16,32]{2,1,0} get-tuple-element(%state), index=1
  %stack = f32[5,8,32]{2,1,0} get-tuple-element(%state), index=2
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=3
  %layer = bf16[16,32]{1,0} fusion(%weights, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/slice"}
  %gemm = (f32[8,32]{1,0}, s8[4194304]{0}) custom-call(%x, %layer), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/dot_general"}, backend_config={"operation_queue_id":"0","gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %y = f32[8,32]{1,0} get-tuple-element(%gemm), index=0
  %both = (f32[5,8,32]{2,1,0}, f32[8]{0}) fusion(%stack, %y, %i), kind=kInput, calls=%fused_update, metadata={op_name="jit(step)/keep"}
  %kept = f32[5,8,32]{2,1,0} get-tuple-element(%both), index=0
  %reduced = f32[8,32]{1,0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[], f32[5,16,32]{2,1,0}, f32[5,8,32]{2,1,0}, bf16[8,16]{1,0}) tuple(%i, %weights, %kept, %x)
}

%condition (state.1: (s32[], f32[5,16,32], f32[5,8,32], bf16[8,16])) -> pred[] {
  %state.1 = (s32[], f32[5,16,32]{2,1,0}, f32[5,8,32]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p0: f32[5,16,32], p1: f32[5,8,32], p2: bf16[8,16], p3: bf16[8,32], p4: bf16[32,4]) -> bf16[8,4] {
  %p0 = f32[5,16,32]{2,1,0} parameter(0)
  %p1 = f32[5,8,32]{2,1,0} parameter(1)
  %p2 = bf16[8,16]{1,0} parameter(2)
  %p3 = bf16[8,32]{1,0} parameter(3)
  %p4 = bf16[32,4]{1,0} parameter(4)
  %start = s32[] constant(0)
  %init = (s32[], f32[5,16,32]{2,1,0}, f32[5,8,32]{2,1,0}, bf16[8,16]{1,0}) tuple(%start, %p0, %p1, %p2)
  %loop = (s32[], f32[5,16,32]{2,1,0}, f32[5,8,32]{2,1,0}, bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %triton = bf16[8,4]{1,0} fusion(%p3, %p4), kind=kCustom, calls=%fused_product, metadata={op_name="jit(step)/last"}
}
"""  # noqa: E501
COUNTER = 4  # bytes


@pytest.fixture(scope="module")
def found():
    return {kernel.what.split("/")[-1]: kernel for kernel in kernels(Module(TEXT))}


def test_each_kernel_counts_as_often_as_it_runs(found):
    """Names, constants, loops and exchanges are no kernels."""
    counts = {name: kernel.count for name, kernel in found.items()}
    assert counts == {"slice": 3, "dot_general": 3, "keep": 3, "last": 1}


def test_a_slice_reads_what_it_takes(found):
    assert found["slice"] == Kernel(
        "bf16[16,32] of jit(step)/slice", 3, 3 * (16 * 32 * (4 + 2) + COUNTER), 0.0
    )


def test_an_update_writes_in_place(found):
    moved = 2 * 8 * 32 * 4 + 8 * 4 + COUNTER  # the rows there and back, their sums
    assert found["keep"].bytes == 3 * moved and found["keep"].flops == 0


def test_products_of_cublas_and_of_fusions(found):
    # Without the workspace that stands among the results.
    moved = 8 * 16 * 2 + 16 * 32 * 2 + 8 * 32 * 4
    assert found["dot_general"].bytes == 3 * moved
    assert found["dot_general"].flops == 3 * 2 * 8 * 16 * 32
    assert found["last"].bytes == 2 * (8 * 32 + 32 * 4 + 8 * 4)
    assert found["last"].flops == 2 * 8 * 32 * 4


def test_the_longer_of_the_two():
    kernel = Kernel("any", 2, 6e9, 4e12)
    assert kernel.seconds(1e12, 1e9) == 6
    assert kernel.seconds(0.5e12, 1e9) == 8


# Adds to one row of a stack in place, and reads one row of it twice.
ADDED = """
HloModule jit_add, is_scheduled=true

%fused_add (p.0: f32[5,32], p.1: f32[1,32], p.2: s32[]) -> f32[5,32] {
  %p.0 = f32[5,32]{1,0} parameter(0)
  %p.1 = f32[1,32]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,32]{1,0} dynamic-slice(%p.0, %p.2, %zero), dynamic_slice_sizes={1,32}
  %sum = f32[1,32]{1,0} add(%row, %p.1)
  ROOT %updated = f32[5,32]{1,0} dynamic-update-slice(%p.0, %sum, %p.2, %zero)
}

%fused_all (q.0: f32[32]) -> (f32[24], f32[24]) {
  %q.0 = f32[32]{0} parameter(0)
  %low = f32[24]{0} slice(%q.0), slice={[0:24]}
  %high = f32[24]{0} slice(%q.0), slice={[8:32]}
  ROOT %halves = (f32[24]{0}, f32[24]{0}) tuple(%low, %high)
}

%fused_scatter (r.0: f32[90,32], r.1: s32[4,1], r.2: f32[4,32]) -> f32[90,32] {
  %r.0 = f32[90,32]{1,0} parameter(0)
  %r.1 = s32[4,1]{1,0} parameter(1)
  %r.2 = f32[4,32]{1,0} parameter(2)
  ROOT %scattered = f32[90,32]{1,0} scatter(%r.0, %r.1, %r.2), update_window_dims={1}, to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%a, %b)
}

ENTRY %main (p0: f32[5,32], p1: f32[1,32], p2: s32[], p3: f32[32]) -> (f32[5,32], f32[24]) {
  %p0 = f32[5,32]{1,0} parameter(0)
  %p1 = f32[1,32]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %p3 = f32[32]{0} parameter(3)
  %empty = u8[64]{0} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(add)/empty"}
  %count = s32[8]{0} iota(), iota_dimension=0, metadata={op_name="jit(add)/count"}
  %both = (f32[24]{0}, f32[24]{0}) fusion(%p3), kind=kLoop, calls=%fused_all, metadata={op_name="jit(add)/both"}
  %first = f32[24]{0} get-tuple-element(%both), index=0
  %new = f32[5,32]{1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused_add, metadata={op_name="jit(add)/new"}
  %table = f32[90,32]{1,0} broadcast(%p2), dimensions={}, metadata={op_name="jit(add)/zeros"}
  %index = s32[4,1]{1,0} bitcast(%p2)
  %rows = f32[4,32]{1,0} bitcast(%p3)
  %scatter = f32[90,32]{1,0} fusion(%table, %index, %rows), kind=kInput, calls=%fused_scatter, metadata={op_name="jit(add)/scatter"}
  ROOT %end = (f32[5,32]{1,0}, f32[24]{0}) tuple(%new, %first)
}
"""  # noqa: E501


def test_a_row_is_added_to_in_place_and_no_array_is_read_twice():
    found = {kernel.what.split("/")[-1]: kernel.bytes for kernel in kernels(Module(ADDED))}
    row = 32 * 4
    assert found == {
        **{"new": 3 * row + COUNTER, "both": row + 2 * 24 * 4},
        "count": 8 * 4,  # reads nothing
        **{"zeros": COUNTER + 90 * row, "scatter": 4 * 4 + (1 + 2) * 4 * row},
    }
