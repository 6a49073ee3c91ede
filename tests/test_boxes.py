"""Sharded checkpoints: any mesh writes, any other reads, and what does not fit or is damaged is named."""

import pytest
import torch

from llava_fn import checkpoint, llava, shares, spec, tree
from llava_fn.boxes import Piece
from llava_fn.checkpoint import Manifest
from llava_fn.parallel.mesh import Axis, Mesh

MESHES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (5, 2)]  # dp x tp


def box_of(p: spec.Param, dp: tuple[int, int], tp: tuple[int, int]):
    """What rank (dp, tp) stores of a parameter: a slice along dim 0 of its tensor-parallel block, without padding."""
    block = spec.shard(p, Mesh(tp=Axis("tp", *tp)))
    cut = [(s.start, s.stop) for s in block]
    size, rank = dp if cut != [(0, n) for n in p.shape] or tp[0] == 1 else (dp[0] * tp[0], dp[1] * tp[0] + tp[1])
    first, last = cut[0]
    step = -(-(last - first) // size)
    cut[0] = (min(first + rank * step, last), min(first + (rank + 1) * step, last))
    return tuple(cut)


def pieces(params, model, parts, dp, tp):
    out = []
    for path, p in spec.leaves({k: v for k, v in llava.spec(model).items() if k in parts}):
        box = box_of(p, dp, tp)
        out.append(Piece(path, p.shape, box, params[path][tuple(slice(a, b) for a, b in box)]))
    return out


def save(folder, manifest, params, moments, tokenizer, mesh, commit=True):
    """Every rank of a mesh (dp, tp) writes its share, and rank 0 commits."""
    for rank in range(mesh[0] * mesh[1]):
        dp, tp = (mesh[0], rank // mesh[1]), (mesh[1], rank % mesh[1])
        of = [pieces(t, manifest.model, manifest.parts, dp, tp) for t in (params, *(moments or ()))]
        shares.write_share(folder, rank, of[0], tuple(of[1:]) if moments else None)
    if commit:
        shares.commit(folder, mesh[0] * mesh[1], manifest, tokenizer, 1.0)


@pytest.fixture(scope="module")
def trees(tiny):
    return [spec.init(llava.spec(tiny), seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def manifest(tiny):
    return Manifest(tiny, ("vision", "projector", "llama"), "square", "plain", None, 7, recipe={"lr": 1.0})


def same(a, b) -> None:
    assert tree.paths(a) == tree.paths(b)
    for x, y in zip(tree.values(a), tree.values(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("mesh", MESHES)
def test_what_any_mesh_writes_one_process_reads(mesh, tmp_path, manifest, trees, tokenizer):
    folder = tmp_path / "000007"
    save(folder, manifest, trees[0], trees[1:], tokenizer.model, mesh)
    loaded = checkpoint.load(folder, moments=True)
    assert loaded.manifest == manifest and loaded.tokenizer == tokenizer.model
    for have, want in zip((loaded.params, *loaded.moments), trees, strict=True):
        same(have, want)
    same(checkpoint.load_model(folder).params, trees[0])
