"""Whether a run recomputes its blocks in the backward pass: only where the device's memory asks for it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Literal

import torch

from llava_fn.batch import IMAGE, Sample, collate
from llava_fn.config import Recompute
from llava_fn.data.options import Data
from llava_fn.launch.ascend import hccl_buffer
from llava_fn.launch.processes import World
from llava_fn.parallel.collectives import total
from llava_fn.plan import trace
from llava_fn.plan.estimate import GIB, hccl_buffers
from llava_fn.plan.options import Assumed
from llava_fn.plan.trace import Workload


def decide(
    choice: Recompute, w: Workload, data: Data, longest: Callable[[], int], world: World
) -> Literal["on", "off"]:  # fmt: skip
    """`choice`, or for "auto" what rank 0 decides and says: "on" if an update does not fit the device without it.

    longest: tokens of the longest samples that are to be expected, at most data.max_tokens. ZeRO 3 needs it on; on a
    CPU "auto" is "off". The update is traced without memory in a process of its own, which takes some seconds.
    """
    if choice != "auto":
        return choice
    if w.parallel.zero == 3:
        return "on"
    if world.device.type == "cpu":
        return "off"
    needed = 0
    if world.first:
        memory = Assumed().memory * torch.get_device_module(world.device).mem_get_info()[1]
        if world.device.type == "npu":
            memory -= hccl_buffers(world.mesh.dp.size, world.mesh.tp.size, hccl_buffer())
        needed = int(_needed(w, micro_batch(data, world.mesh.dp.size, longest()), memory))
    if world.mesh.all.size > 1:
        needed = int(total(torch.tensor([needed], device=world.device), world.mesh.all))
    return "on" if needed else "off"


def micro_batch(data: Data, dp: int, longest: int) -> tuple[int, int]:
    """Samples of the largest micro-batch of a rank, and the tokens of each, if all are the longest."""
    parts = dp * data.accumulate
    return max(1, math.ceil(data.tokens / parts / longest if data.tokens else data.samples / parts)), longest


def _needed(w: Workload, micro: tuple[int, int], memory: float) -> bool:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # this process belongs to a group already
        peak = pool.submit(peak_memory, w, *micro).result()
    needed = peak > memory
    print(
        f"recompute: {'on' if needed else 'off'}; without it an update takes about {peak / GIB:.3g} GiB of the "
        f"{memory / GIB:.3g} GiB that tensors can have ({micro[0]} samples of {micro[1]} tokens at a time); "
        "--recompute on or off overrules this", file=sys.stderr,
    )  # fmt: skip
    return needed


def peak_memory(w: Workload, samples: int, tokens: int) -> int:
    """Bytes at the peak of an update without recomputation, from micro-batches of such samples, each with an image."""
    ids = [1, *[IMAGE] * w.model.vision.patches]
    ids += [1] * (max(tokens, len(ids) + 1) - len(ids))
    label = (False,) * (len(ids) // 2) + (True,) * (len(ids) - len(ids) // 2)
    pixels = torch.zeros(1, dtype=torch.uint8).expand(1, 3, w.model.vision.image, w.model.vision.image)
    batch = collate([Sample("", tuple(ids), label, pixels)] * samples, w.parallel.tp, w.model.vision.image)
    return sum(trace.update(replace(w, recompute=False), [batch, batch]).peak.values())
