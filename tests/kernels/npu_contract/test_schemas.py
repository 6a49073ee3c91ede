"""(A) Every fused call binds to the schema that torch_npu registers: of this torch's line, and of others."""

import functools
import os
import re
from pathlib import Path

import pytest
import torch
import torch_npu
from calls import Call, calls
from limits import LIMITS

OTHERS = [Path(path) for path in os.environ.get("LLAVA_FN_TORCH_NPU_OTHERS", "").split(os.pathsep) if path]
CALLS = calls()


def mismatch(call: Call, schema: torch._C.FunctionSchema) -> str:
    """Why the call does not bind to the schema, or nothing."""
    in_order = [a.name for a in schema.arguments if not a.kwarg_only]
    names = [a.name for a in schema.arguments]
    given = in_order[: call.positional] + list(call.keywords)
    if call.positional > len(in_order):
        return f"{call.positional} positional arguments, but there are {len(in_order)}"
    if unknown := sorted(set(call.keywords) - set(names)):
        return f"unknown {unknown}"
    if twice := sorted({name for name in given if given.count(name) > 1}):
        return f"given twice: {twice}"
    missing = [a.name for a in schema.arguments if not a.has_default_value() and a.name not in given]
    return f"missing {missing}" if missing else ""


def registered(op: str) -> torch._C.FunctionSchema:
    """The schema in the dispatcher of the loaded torch_npu."""
    return getattr(torch.ops.npu, op).default._schema


@functools.cache
def written(wheel: Path) -> dict[str, list[torch._C.FunctionSchema]]:
    """Schemas by op, from the texts that the wheel's library registers them with: no torch of its line is needed."""
    library = (wheel / "torch_npu/lib/libtorch_npu.so").read_bytes()
    found: dict[str, list[torch._C.FunctionSchema]] = {}
    for text in set(re.findall(rb"npu_[a-z_]+\([^\0]*\) -> [^\0]*", library)):
        try:
            schema = torch._C.parse_schema(f"npu::{text.decode()}")
        except RuntimeError:  # the same signature in the notation of Python's bindings
            continue
        found.setdefault(schema.name.removeprefix("npu::"), []).append(schema)
    return found


def test_the_kernels_call_fused_ops():
    assert {c.op for c in CALLS} == {
        "npu_add_rms_norm", "npu_all_gather_base_mm", "npu_cross_entropy_loss", "npu_fast_gelu",
        "npu_fused_infer_attention_score", "npu_fusion_attention", "npu_gelu", "npu_mm_reduce_scatter_base",
        "npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul", "npu_scatter_pa_kv_cache", "npu_swiglu",
        "npu_weight_quant_batchmatmul",
    }  # fmt: skip


def test_every_op_that_is_called_has_its_limits_with_names_of_its_schema():
    assert {f"npu::{c.op}" for c in CALLS} <= LIMITS.keys()
    for row in LIMITS.values():
        space, _, name = row.op.partition("::")
        op = getattr(getattr(torch.ops, space), name.partition(".")[0])
        names = {a.name for a in getattr(op, name.partition(".")[2] or "default")._schema.arguments}
        given = {*row.dtypes, *row.ranks, *row.contiguous, *row.alike}
        assert {"self" if x == "input" and "self" in names else x for x in given} <= names, row.op
        assert row.source.startswith("https://") and set(row.cards) == {"A2", "A3", "950"}


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.where}:{c.op}")
def test_call_binds_to_the_registered_schema(call):
    assert hasattr(torch_npu, call.op)
    assert mismatch(call, registered(call.op)) == ""


@pytest.mark.parametrize("wheel", OTHERS, ids=lambda path: path.name)
@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.where}:{c.op}")
def test_call_binds_to_the_schema_of_another_wheel(call, wheel):
    schemas = written(wheel)[call.op]
    assert any(mismatch(call, schema) == "" for schema in schemas), [mismatch(call, s) for s in schemas]


@pytest.mark.parametrize("op", sorted({c.op for c in CALLS}))
def test_schemas_read_off_a_wheel_are_those_that_it_registers(op):
    mine = written(Path(os.environ["LLAVA_FN_TORCH_NPU"]))[op]
    assert str(registered(op)) in {str(schema) for schema in mine}


@pytest.mark.parametrize(
    "call, said",
    [
        (Call("", "npu_fusion_attention", 5, ("pre_tokens",)), "unknown"),  # v1 spells it pre_tockens
        (Call("", "npu_fusion_attention", 4, ()), "missing"),
        (Call("", "npu_rms_norm", 1, ("input", "gamma")), "twice"),
        (Call("", "npu_rms_norm", 0, ("self", "gamma")), "unknown"),  # as the documentation calls it
        (Call("", "npu_gelu", 2, ()), "positional"),
    ],
)
def test_a_call_that_does_not_bind_is_found(call, said):
    assert said in mismatch(call, registered(call.op))
