"""(E) What is read off a wheel's library: methods of collectives and events, the grammar of environment variables."""

import ast
import functools
import mmap
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from calls import KERNELS

from llava_fn.launch.ascend import AFFINITY_SWITCHES, ALLOCATOR_KEYS, ASCEND_VARIABLES, check_environment

OTHERS = [path for path in os.environ.get("LLAVA_FN_TORCH_NPU_OTHERS", "").split(os.pathsep) if path]
WHEELS = [Path(path) for path in dict.fromkeys([os.environ["LLAVA_FN_TORCH_NPU"], *OTHERS])]
METHODS = {  # operation of torch's functional collectives or of torch.distributed -> method of a process group
    "all_reduce": "allreduce", "all_gather_into_tensor": "_allgather_base", "all_gather_tensor": "_allgather_base",
    "reduce_scatter_tensor": "_reduce_scatter_base", "broadcast": "broadcast", "barrier": "barrier",
    "all_reduce_coalesced": "allreduce_coalesced",
    "all_gather_into_tensor_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",
}  # fmt: skip
EVENTS = ("record", "synchronizeEvent", "queryEvent", "destroyEvent", "block")  # behind torch.Event
EXAMPLES = """
ASCEND_RT_VISIBLE_DEVICES=0,1,2
TASK_QUEUE_ENABLE=2
ASCEND_LAUNCH_BLOCKING=1
CPU_AFFINITY_CONF=1
CPU_AFFINITY_CONF=2
CPU_AFFINITY_CONF=1,npu0:0-1,npu1:2-5,npu1:7-8,npu3:9-9
CPU_AFFINITY_CONF=1,npu0:0-0,npu2:1-2,npu2:4-4
CPU_AFFINITY_CONF=1,npu_affine:1
CPU_AFFINITY_CONF=2,force:1,npu0:0-3
PYTORCH_NPU_ALLOC_CONF=max_split_size_mb:32,garbage_collection_threshold:0.6
PYTORCH_NPU_ALLOC_CONF=expandable_segments:True,base_addr_aligned_kb:16
PYTORCH_NPU_ALLOC_CONF=page_size:1g
PYTORCH_NPU_ALLOC_CONF=expandable_segments:True,segment_size_mb:40
PYTORCH_NPU_ALLOC_CONF=roundup_power2_divisions:4
PYTORCH_NPU_ALLOC_CONF=roundup_power2_divisions:[256:1,512:2,1024:4,>:8]
PYTORCH_NPU_ALLOC_CONF=multi_stream_lazy_reclaim:True
PYTORCH_NPU_ALLOC_CONF=pinned_use_background_threads:True
PYTORCH_NPU_ALLOC_CONF=pin_memory_expandable_segments:True
PYTORCH_NPU_ALLOC_CONF=pinned_mem_register:True
PYTORCH_NPU_ALLOC_CONF=large_segment_size_mb:50
PYTORCH_NPU_ALLOC_CONF=per_process_memory_fraction:0.5
PYTORCH_NPU_ALLOC_CONF=throw_on_npumalloc_oom:True
PYTORCH_NPU_ALLOC_CONF=pinned_max_round_threshold_mb:128,pinned_max_cached_size_mb:256
PYTORCH_NPU_ALLOC_CONF=max_split_size_mb:50,max_non_split_rounding_mb:30
PYTORCH_NPU_ALLOC_CONF=release_lock_on_npumalloc:True
HCCL_CONNECT_TIMEOUT=200
HCCL_EXEC_TIMEOUT=1800
HCCL_EXEC_TIMEOUT=0.05
HCCL_EXEC_TIMEOUT=0
HCCL_EVENT_TIMEOUT=1800
HCCL_BUFFSIZE=200
P2P_HCCL_BUFFSIZE=20
""".split()  # of the documents that check_environment names


def library(wheel: Path) -> Path:
    return wheel / "torch_npu/lib/libtorch_npu.so"


def texts(wheel: Path, part: str) -> set[str]:
    """The texts of the library, each between two zeros, that hold this part."""
    found, at = set(), -1
    with open(library(wheel), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (at := data.find(part.encode(), at + 1)) >= 0:
            found.add(data[data.rfind(b"\0", 0, at) + 1 : data.find(b"\0", at)].decode("latin-1"))
    return found


@functools.cache
def defined(wheel: Path) -> str:
    """Functions that the library defines."""
    command = ["nm", "-DC", "--defined-only", str(library(wheel))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def reached() -> set[str]:
    """Collective operations that the project's source calls."""
    found = set()
    for path in (KERNELS.parent / "parallel/collectives.py", KERNELS / "parallel_linear.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found |= {node.attr} if node.value.id in ("_OPS", "funcol") and node.attr != "wait_tensor" else set()
    return found


def test_every_collective_that_is_reached_has_a_method():
    assert reached() <= METHODS.keys() and {"all_reduce", "all_reduce_coalesced", "broadcast"} <= reached()


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_methods_of_the_process_group_and_of_events_are_overridden(wheel):
    for method in {METHODS[name] for name in reached()} | {"barrier"}:
        assert f"ProcessGroupHCCL::{method}(" in defined(wheel), method
    for method in EVENTS:
        assert f"NPUGuardImpl::{method}(" in defined(wheel), method


def said(wheel: Path) -> dict[str, list[str]]:
    """Variable -> values, from the texts "X should be 0, 1 or 2"."""
    found = {}
    for text in texts(wheel, " should be "):
        if match := re.fullmatch(r"([A-Z_]+) should be ((?:\d(?:, or |, | or )?)+)\.?", text):
            found[match[1]] = re.findall(r"\d", match[2])
    return found


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_values_are_legal_where_the_wheel_says_so(wheel):
    ours = {
        row.name: row.legal.removeprefix("one of ").split(", ") for row in ASCEND_VARIABLES if "one of" in row.legal
    }
    theirs = {name: values for name, values in said(wheel).items() if name in ours}
    assert {"TASK_QUEUE_ENABLE", "COMBINED_ENABLE", "ASCEND_GLOBAL_LOG_LEVEL"} <= theirs.keys()
    assert theirs == {name: ours[name] for name in theirs}


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_switches_of_the_affinity_of_cores_are_those_that_the_wheel_looks_for(wheel):
    switches = {match[1] for text in texts(wheel, r":(\d)") if (match := re.fullmatch(r"([a-z_]+):\(\\d\)", text))}
    assert switches and switches <= set(AFFINITY_SWITCHES)
    assert "^npu[0-9]{1,2}$" in texts(wheel, "^npu[") or wheel != WHEELS[0]


def test_some_wheel_looks_for_each_switch_and_each_key_of_the_allocator():
    for text in (*ALLOCATOR_KEYS, *(rf"{name}:(\d)" for name in AFFINITY_SWITCHES)):
        assert any(text in texts(wheel, text) for wheel in WHEELS), text


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_documents_are_legal(example):
    name, _, value = example.partition("=")
    assert check_environment({name: value}) == {name: value}


MISTAKES = {  # -> name here, what stands in its place, the test that sees it
    "no such collective": ("METHODS", METHODS | {"broadcast": "broadcast_all"}, "methods_of_the_process_group"),
    "no such event": ("EVENTS", (*EVENTS, "waitForEver"), "methods_of_the_process_group"),
    "a collective nobody thought of": ("METHODS", {}, "every_collective"),
    "a value too few": (
        "ASCEND_VARIABLES", [replace(row, legal=row.legal.replace("0, 1, 2", "0, 1")) for row in ASCEND_VARIABLES],
        "values_are_legal",
    ),
    "a switch too few": ("AFFINITY_SWITCHES", (), "switches_of_the_affinity"),
    "a switch too many": ("AFFINITY_SWITCHES", (*AFFINITY_SWITCHES, "numa"), "some_wheel"),
    "a key too many": ("ALLOCATOR_KEYS", {"expandable_segmets": None}, "some_wheel"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_goes_red_against_the_wheel(name, monkeypatch):
    what, instead, seen_by = MISTAKES[name]
    (test,) = (value for key, value in globals().items() if key.startswith(f"test_{seen_by}"))
    monkeypatch.setitem(globals(), what, instead)
    with pytest.raises((AssertionError, KeyError)):
        test(*[WHEELS[0]] * test.__code__.co_argcount)
