"""Parsing, on a text whose figures are added up by hand; tests/tpu_compile has real ones."""

import pytest

from msvit_jax.aot import hlo


def _cost(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}},"x":["1"]}}'


KERNEL = 'custom-call(%p), custom_call_target="tpu_custom_call", operand_layout_constraints={}'
TEXT = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{(f32[8,4]{{1,0:T(8,128)}})->f32[8,4]{{1,0}}}}

%fused (p.0: f32[8,4]) -> f32[8,4] {{
  %p.0 = f32[8,4]{{1,0:T(8,128)}} parameter(0)
  ROOT %inside = f32[8,4]{{1,0}} add(%p.0, %p.0), {_cost(1000000)}
}}

%body.1 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %arg = (s32[]{{:T(128)}}, f32[8,4]{{1,0:T(8,128)}}) parameter(0)
  %gte = f32[8,4]{{1,0}} get-tuple-element(%arg), index=1
  %fusion.5 = f32[8,4]{{1,0:T(8,128)S(1)}} fusion(%gte), kind=kLoop, calls=%fused, {_cost(10)}
  %kernel.1 = f32[8,4]{{1,0}} {KERNEL}
  ROOT %t = (s32[]{{:T(128)}}, f32[8,4]{{1,0}}) tuple(%gte, %fusion.5)
}}

%condition.1 (arg.1: (s32[], f32[8,4])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(12)
  %arg.1 = (s32[]{{:T(128)}}, f32[8,4]{{1,0}}) parameter(0)
  %count = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=0
  ROOT %lt.0 = pred[]{{:T(512)}} compare(%count, %bound), direction=LT
}}

%unknown (arg.2: (s32[], f32[8,4])) -> pred[] {{
  %zero = f32[]{{:T(128)}} constant(0)
  %arg.2 = (s32[]{{:T(128)}}, f32[8,4]{{1,0}}) parameter(0)
  %value = f32[8,4]{{1,0}} get-tuple-element(%arg.2), index=1
  ROOT %gt.0 = pred[]{{:T(512)}} compare(%value, %zero), direction=GT
}}

%cheap (c.0: f32[8,4]) -> f32[8,4] {{
  ROOT %c.1 = f32[8,4]{{1,0}} fusion(%c.0), kind=kLoop, calls=%fused, {_cost(100)}
}}

%dear (d.0: f32[8,4]) -> f32[8,4] {{
  ROOT %d.1 = f32[8,4]{{1,0}} fusion(%d.0), kind=kLoop, calls=%fused, {_cost(3000)}
}}

ENTRY %main.9 (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0:T(8,128)}} parameter(0), sharding={{replicated}}
  %copy.1 = f32[8,4]{{0,1:T(8,128)}} copy(%p), metadata={{op_name="a/b(c)/reshape"}}, {_cost(7)}
  %both = (f32[8]{{0:T(256)}}, /*index=1*/bf16[8,4]{{1,0}}) fusion(%p), kind=kOutput, calls=%fused, {_cost(20)}
  %while.1 = (s32[]{{:T(128)}}, f32[8,4]{{1,0}}) while(%tuple.1), condition=%condition.1, body=%body.1
  %while.2 = (s32[], f32[8,4]) while(%tuple.1), condition=%unknown, body=%body.1, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %while.3 = (s32[], f32[8,4]) while(%tuple.1), condition=%unknown, body=%body.1
  %if = f32[8,4]{{1,0}} conditional(%index, %p, %p), branch_computations={{%cheap, %dear}}
  %kernel.2 = f32[8,4]{{1,0}} {KERNEL}
  %other = f32[8,4]{{1,0}} custom-call(%p), custom_call_target="ConcatBitcast"
  %sum = (f32[16]{{0}}, bf16[4,4]{{1,0}}) all-reduce(%p, %both), channel_id=1, replica_groups=[1,4]<=[4]
  %start = (f32[8,4]{{1,0}}, f32[32,4]{{1,0}}) all-gather-start(%p), channel_id=2, dimensions={{0}}
  %done = f32[32,4]{{1,0}} all-gather-done(%start)
  %moved = (s32[2,4]{{1,0}}, s32[2,4]{{1,0}}, u32[], u32[]) collective-permute-start(%p), channel_id=3
  ROOT %sum.2 = f32[8,4]{{1,0}} all-reduce(%p), channel_id=4, to_apply=%cheap
}}
"""  # noqa: E501


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def test_computations_and_opcodes(module):
    assert module.entry == "main.9"
    assert {"fused", "body.1", "condition.1", "cheap", "dear"} < set(module.computations)
    opcodes = [i.opcode for i in module.computations["main.9"]]
    assert opcodes[:4] == ["parameter", "copy", "fusion", "while"]
    assert opcodes[-1] == "all-reduce"
    assert len(opcodes) == 14


def test_cycles_by_hand(module):
    cycles = hlo.cycles(module)
    # copy + fusion + 12, 5 and 1 trips of the loop + the dearer branch; fusions are not entered.
    assert cycles.total == 7 + 20 + (12 + 5 + 1) * 10 + 3000
    assert cycles.kernels.calls == 12 + 5 + 1 + 1
    assert (cycles.loops, cycles.unknown) == (3, 1)


def test_what_kernels_state_is_added_up():
    stated = '"cost_estimate":{"flops":"%d","transcendentals":"%d","bytes_accessed":"%d"}'
    used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}]'
    call = '  %%k.%d = f32[8]{0} custom-call(%%p), custom_call_target="tpu_custom_call", %s, %s'
    lines = [
        call % (1, stated % (100, 10, 30), used % 512),
        call % (2, stated % (200, 20, 40), used % 256),
        '  %k.3 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"',
    ]
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n" + "\n".join(lines) + "\n}\n"
    found = hlo.cycles(hlo.parse(text)).times(3).kernels
    assert found == hlo.Kernels(calls=9, flops=900, transcendentals=90, moved_bytes=210, vmem=512)


def test_collectives_by_hand(module):
    assert hlo.collectives(module) == {
        "all-gather": hlo.Collective(1, 32 * 4 * 4),
        "all-reduce": hlo.Collective(2, 16 * 4 + 4 * 4 * 2 + 8 * 4 * 4),
        "collective-permute": hlo.Collective(1, 2 * 4 * 4),
    }


@pytest.mark.parametrize(
    ("dtype", "dims", "size"),
    [("bf16", "128,197", 50432), ("f32", "", 4), ("pred", "3", 3), ("s4", "3", 2), ("u8", "0", 0)],
)
def test_bytes_of_a_shape(dtype, dims, size):
    assert hlo.shape_bytes(dtype, dims) == size


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("error: nothing here")
