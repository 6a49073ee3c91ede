"""A model of two blocks with random weights, and samples for it: the same numbers on every device and mesh."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from llava_fn import config, llava, optim, spec, train, tree
from llava_fn.batch import IMAGE, Sample
from llava_fn.parallel.mesh import Mesh
from llava_fn.parallel.zero import Zero

MODEL = config.LLAVA_EMOJI


def samples(n: int) -> list[Sample]:
    """n images with 3 to 3 + n random tokens, of which the last three carry a label."""
    rng, out = torch.Generator().manual_seed(0), []
    for j in range(n):
        words = torch.randint(4, MODEL.llama.vocab, (4 + j,), generator=rng).tolist()
        ids = (1, *[IMAGE] * MODEL.vision.patches, *words)
        side = MODEL.vision.image
        pixels = torch.randint(0, 256, (1, 3, side, side), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), ids, (False,) * (len(ids) - 3) + (True,) * 3, pixels))
    return out


def params(device: torch.device, mesh: Mesh = Mesh()) -> TensorDict:
    """This rank's block of each parameter, f32[...]."""
    p = spec.init(llava.spec(MODEL), 0, mesh)
    return tree.rebuild(p, [x.to(device) for x in tree.values(p)])


def task(
    device: torch.device, dtype: torch.dtype = torch.float32, mesh: Mesh = Mesh(), level: int = 0
) -> tuple[train.TrainState, train.Task]:
    """What updates of all parameters begin with. dtype: of the computation; masters are fp32."""
    zero = Zero(llava.spec(MODEL), mesh, level, dtype)
    trained, frozen = tree.split(params(device, mesh), lambda _: True)
    stored = zero.store(trained)
    run = llava.execution(level == 3, "", zero, MODEL.vision)  # which needs recompute
    return train.TrainState(0, stored, optim.init(stored)), train.Task(frozen, MODEL, optim.Optim(), 10, zero, run=run)
