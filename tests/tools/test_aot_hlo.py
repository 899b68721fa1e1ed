"""What is counted in the text of a compiled program, on a small one written by hand."""

from __future__ import annotations

import pytest

from tools.aot_hlo import Program, arrays

# a loop of seven rounds around a fusion that writes one row of a cache in place and reads it all; an asynchronous
# all-gather that stands in the text twice, a synchronous one, and a Pallas call; the row is read through a fusion that
# only takes its operand's memory for an array of other tiles
TEXT = """HloModule step, entry_computation_layout={(f32[8,128]{1,0})->f32[8,128]{1,0}}

%fused_update (param_0: f32[100,128], param_1: f32[1,128], param_2: s32[]) -> f32[100,128] {
  %param_0 = f32[100,128]{1,0} parameter(0)
  %param_1 = f32[1,128]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %update = f32[100,128]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %param_2)
}

%fused_view (input: f32[100,128]) -> f32[100,128] {
  %input = f32[100,128]{1,0:T(32,128)} parameter(0)
  ROOT %tiled = f32[100,128]{1,0:T(8,128)} copy(%input)
}

%fused_slice (param_0.1: f32[100,128], param_1.1: s32[]) -> f32[1,128] {
  %param_0.1 = f32[100,128]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %view = f32[100,128]{1,0} fusion(%param_0.1), calls=%fused_view
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%view, %param_1.1, %param_1.1), dynamic_slice_sizes={1,128}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (state: (s32[], f32[100,128])) -> (s32[], f32[100,128]) {
  %state = (s32[], f32[100,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %cache = f32[100,128]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,128]{1,0} fusion(%cache, %i), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"10"}
  %next = f32[100,128]{1,0} fusion(%cache, %row, %i), calls=%fused_update, backend_config={"estimated_cycles":"30"}
  %total = f32[1,128]{1,0} all-reduce(%row), channel_id=5, to_apply=%sum
  ROOT %out = (s32[], f32[100,128]{1,0}) tuple(%i, %next)
}

%condition (state.1: (s32[], f32[100,128])) -> pred[] {
  %state.1 = (s32[], f32[100,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[100,128], w: bf16[64,128]) -> f32[100,128] {
  %x = f32[100,128]{1,0} parameter(0)
  %w = bf16[64,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %near = f32[100,128]{1,0:T(8,128)S(1)} copy(%x)
  %far = f32[100,128]{1,0:T(8,128)} copy(%x)
  %first = bf16[256,128]{1,0} all-gather(%w), channel_id=1, dimensions={0}, frontend_attributes={chain_id="9"}
  %again = bf16[256,128]{1,0} all-gather(%w), channel_id=1, dimensions={0}, frontend_attributes={chain_id="9"}
  %alone = bf16[128,128]{1,0} all-gather(%w), channel_id=2, dimensions={0}
  %begin = (s32[], f32[100,128]{1,0}) tuple(%zero, %far)
  %kernel = f32[8,128]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", kernel_metadata={
{ "a": 1
}
}}
  %loop = (s32[], f32[100,128]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %end = f32[100,128]{1,0} get-tuple-element(%loop), index=1
}
"""
CACHE, ROW, W = 100 * 128 * 4, 128 * 4, 64 * 128 * 2


def test_arrays_of_a_type() -> None:
    shapes = arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[], pred[5]{0})")
    assert [(s.size, s.in_hbm) for s in shapes] == [(12, False), (4, True), (5, True)]


def test_loops_are_multiplied_and_repeats_left_out() -> None:
    counts = Program(TEXT).count()
    assert counts.collectives == {"all-gather": 4 * W + 2 * W, "all-reduce": 7 * ROW}
    assert counts.synchronous == {"all-gather": 2 * W, "all-reduce": 7 * ROW}
    assert counts.cycles == 7 * 40
    assert (counts.pallas, counts.unknown_loops) == (1, 0)
    assert counts.largest_copy == CACHE


def test_slices_and_updates_in_place_count_as_what_they_touch() -> None:
    counts = Program(TEXT).count()
    in_the_loop = 7 * ((ROW + 4 + ROW) + (ROW + 4 + ROW) + 2 * ROW)  # the slice, the update, the sum over chips
    copies = CACHE + 2 * CACHE  # of one the copy is in a core's own memory
    gathers = 2 * (W + 4 * W) + (W + 2 * W)
    assert counts.traffic == in_the_loop + copies + gathers + (W + 8 * 128 * 4)


def test_a_loop_whose_rounds_nobody_knows_counts_once() -> None:
    counts = Program(TEXT.replace("%limit = s32[] constant(7)", "%limit = s32[] parameter(1)")).count()
    assert (counts.cycles, counts.unknown_loops) == (40, 1)


def test_cycles_that_the_compiler_could_not_estimate() -> None:
    counts = Program(TEXT.replace('"estimated_cycles":"30"', '"estimated_cycles":"9223372036854775807"')).count()
    assert counts.cycles == 7 * 10


def test_a_text_that_is_none() -> None:
    with pytest.raises(ValueError, match="no text of a compiled program"):
        Program("nothing")
