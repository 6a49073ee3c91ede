"""Whether blocks are recomputed: by the device's memory, unless the user says."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_fn import config
from llava_fn.config import Parallel
from llava_fn.data.options import Data
from llava_fn.launch.processes import World
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.plan import recompute
from llava_fn.plan.estimate import GIB
from llava_fn.plan.trace import Workload

W = Workload(config.LLAVA_EMOJI, ("projector",), Parallel(), 2, 0, torch.float32, False)
CARD, CPU = World(torch.device("cuda")), World()


def never():
    raise AssertionError("measured")


@pytest.mark.parametrize(
    "choice, zero, world, want",
    [
        ("on", 1, CPU, "on"),
        ("off", 1, CARD, "off"),
        ("auto", 1, CPU, "off"),
        ("auto", 3, CPU, "on"),
        ("auto", 3, CARD, "on"),
    ],
)
def test_what_needs_no_trace_is_decided_without_one(choice, zero, world, want):
    w = replace(W, parallel=Parallel(zero=zero))
    assert recompute.decide(choice, w, Data(), never, world) == want


def test_a_card_recomputes_only_where_an_update_does_not_fit_it(monkeypatch, capsys):
    peak = recompute.peak_memory(W, 3, 90)
    npu = World(SimpleNamespace(type="npu"), Mesh(dp=Axis("dp", 2)))  # whose HCCL takes 400 MiB
    with_hccl = peak + 400 * 2**20
    for world, memory, want in (
        (CARD, peak / 0.9 * 1.01, "off"), (CARD, peak / 0.9 * 0.99, "on"), (npu, with_hccl / 0.9 * 0.99, "on"),
        (npu, with_hccl / 0.9 * 1.01, "off"),
    ):  # fmt: skip
        if want == "on":  # one real process is enough
            monkeypatch.setattr(recompute, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
        card = SimpleNamespace(mem_get_info=lambda memory=memory: (0, memory))
        monkeypatch.setattr(torch, "get_device_module", lambda device, card=card: card)
        assert (
            recompute.decide("auto", W, Data(samples=5, accumulate=2 // world.mesh.dp.size), lambda: 90, world) == want
        )
        said = capsys.readouterr().err
        assert said.startswith(f"recompute: {want}; without it an update takes about {peak / GIB:.3g} GiB")
        assert "3 samples of 90 tokens" in said and "--recompute on or off" in said


def test_memory_grows_with_samples_and_with_tokens():
    sizes = [recompute.peak_memory(W, n, t) for n, t in ((2, 60), (4, 60), (4, 120))]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("data, dp, want", [
    (Data(samples=256, accumulate=32), 1, (8, 600)), (Data(samples=10, accumulate=2), 2, (3, 600)),
    (Data(tokens=5000), 2, (5, 600)), (Data(tokens=500), 2, (1, 600)),
])  # fmt: skip
def test_the_largest_micro_batch_is_of_the_longest_samples(data, dp, want):
    assert recompute.micro_batch(data, dp, 600) == want
