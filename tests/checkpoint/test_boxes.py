"""Sharded checkpoints: any mesh writes, any other reads, and what does not fit or is damaged is named."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import copy, interrupted, largest_file

from llava_fn import llava, spec, tree
from llava_fn.checkpoint import boxes, shares
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.boxes import Piece
from llava_fn.checkpoint.folder import Manifest
from llava_fn.checkpoint.shares import Background
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.parallel.zero import Zero
from llava_fn.runs.options import Saving
from llava_fn.runs.run import Run
from llava_fn.weights import export
from llava_fn.weights.source import open_source

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


# Boxes.


def inside(rng, shape):
    return tuple(tuple(sorted(torch.randint(0, n + 1, (2,), generator=rng).tolist())) for n in shape)


def cut(value, box):
    return value[tuple(slice(a, b) for a, b in box)]


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 2, 4)])
def test_flaws_are_what_counting_every_number_finds(shape):
    rng = torch.Generator().manual_seed(len(shape))
    seen = set()
    for trial in range(200):
        parts = [inside(rng, shape) for _ in range(trial % 4)] + [boxes.whole(shape)] * (trial % 3 == 0)
        counts = torch.zeros(shape, dtype=torch.int32)
        for part in parts:
            cut(counts, part).add_(1)
        found = torch.ones(shape, dtype=torch.int32)
        for box, numbers in boxes.flaws(boxes.whole(shape), parts):
            assert (cut(found, box) == 1).all() and len(numbers) != 1  # no place twice
            assert numbers == [i for i, part in enumerate(parts) if boxes.overlap(part, box) == box]
            cut(found, box).fill_(len(numbers))
        assert torch.equal(found, counts)
        seen |= set(counts.unique().tolist())
    assert {0, 1, 2} <= seen


def test_a_piece_that_is_not_its_box_is_refused():
    for shape, box, value, said in (
        ((4, 2), ((0, 5), (0, 2)), torch.zeros(5, 2), r"a/b: box 0:5,0:2 is not inside its shape \(4, 2\)"),
        ((4, 2), ((0, 4),), torch.zeros(4), r"a/b: box 0:4 is not inside"),
        ((4, 2), ((3, 2), (0, 2)), torch.zeros(0, 2), r"a/b: box 3:2,0:2 is not inside"),
        (
            (4, 2),
            ((0, 2), (0, 2)),
            torch.zeros(3, 2),
            r"box 0:2,0:2 is torch.float32 of \(3, 2\), not fp32 of \(2, 2\)",
        ),
        ((4, 2), ((0, 2), (0, 2)), torch.zeros(2, 2).double(), r"torch.float64 of \(2, 2\), not fp32"),
    ):
        with pytest.raises(ValueError, match=said):
            Piece(("a", "b"), shape, box, value)


# Reading.


@pytest.fixture(scope="module")
def saved(tmp_path_factory, manifest, trees, tokenizer):
    """A checkpoint of the mesh dp 2 x tp 2; tests copy it before they touch it."""
    folder = tmp_path_factory.mktemp("sharded") / "000007"
    save(folder, manifest, trees[0], trees[1:], tokenizer.model, (2, 2))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, manifest, trees, tokenizer):
    """The same, written by one process."""
    folder = tmp_path_factory.mktemp("whole") / "000007"
    checkpoint.save(folder, manifest, trees[0], trees[1:], tokenizer.model)
    return folder


@pytest.mark.parametrize("written", [(1, 1), (3, 1), (2, 2), (5, 2)])
def test_what_any_mesh_writes_any_other_reads(written, tmp_path, manifest, trees, tokenizer):
    folder = tmp_path / "000007"
    save(folder, manifest, trees[0], trees[1:], tokenizer.model, written)
    reader = checkpoint.open_checkpoint(folder).tensors
    empty = 0
    for read in ((1, 2), (3, 1), (5, 2)):
        for rank in range(read[0] * read[1]):
            dp, tp = (read[0], rank // read[1]), (read[1], rank % read[1])
            for kind, params in zip(boxes.KINDS, trees, strict=True):
                for piece in pieces(params, manifest.model, manifest.parts, dp, tp):
                    assert torch.equal(reader.read(kind, piece.path, piece.box), piece.value)
                    empty += not piece.value.numel()
    assert empty  # some ranks had nothing of some tensor


def test_any_box_of_any_checkpoint_is_read(saved, one, trees):
    rng = torch.Generator().manual_seed(0)
    for folder in (saved, one):
        reader = checkpoint.open_checkpoint(folder).tensors
        for path in tree.paths(trees[0]):
            for kind, params in zip(boxes.KINDS, trees, strict=True):
                box = inside(rng, params[path].shape)
                assert torch.equal(reader.read(kind, path, box), cut(params[path], box))
        with pytest.raises(ValueError, match=r"llama/norm: box 3:17 is not inside its shape \(16,\)"):
            reader.read("params", ("llama", "norm"), ((3, 17),))
        with pytest.raises(ValueError, match="holds no third of llama/norm"):
            reader.read("third", ("llama", "norm"))


def test_what_is_read_may_be_written_to(saved, one):
    for folder in (saved, one):
        before = checkpoint.fingerprint(folder)
        checkpoint.open_checkpoint(folder).tensors.read("params", ("llama", "embed")).zero_()
        assert checkpoint.open_checkpoint(folder).tensors.read("params", ("llama", "embed")).any()
        checkpoint.verify(folder)
        assert checkpoint.fingerprint(folder) == before


def test_only_files_that_hold_the_box_are_opened(saved, trees):
    reader = checkpoint.open_checkpoint(saved).tensors
    assert not reader.opened
    want = reader.read("params", ("llama", "embed"), ((0, 100), (2, 9)))
    assert torch.equal(want, trees[0]["llama", "embed"][:100, 2:9])
    assert sorted(reader.opened) == ["params-00000.safetensors"]  # rows 0:128 are its own


def test_a_process_loads_half_precision_of_a_converted_checkpoint_by_boxes(tmp_path, manifest, trees, tokenizer):
    half = tree.cast(trees[0], torch.float16)
    checkpoint.save(tmp_path / "a", manifest, half, None, tokenizer.model)
    reader = checkpoint.open_checkpoint(tmp_path / "a").tensors
    part = reader.read("params", ("llama", "head"), ((7, 9), (0, 16)))
    assert part.dtype == torch.float16 and torch.equal(part, half["llama", "head"][7:9])
    assert reader.read("params", ("llama", "head"), ((7, 7), (0, 16))).dtype == torch.float16


def test_sha256sum_accepts_a_sharded_checkpoint(saved):
    names = [f"{kind}-{rank:05d}.safetensors" for kind in ("optim", "params") for rank in range(4)]
    assert sorted(p.name for p in saved.iterdir()) == sorted(
        ["SHA256SUMS", "boxes.json", "manifest.json", "tokenizer.model", *names]
    )
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 11


def test_a_sharded_checkpoint_without_moments_says_so(tmp_path, manifest, trees, tokenizer):
    save(tmp_path / "a", manifest, trees[0], None, tokenizer.model, (2, 1))
    same(checkpoint.load(tmp_path / "a").params, trees[0])
    with pytest.raises(ValueError, match="saved without optimizer state; .*--saving.no-load-optim"):
        checkpoint.load(tmp_path / "a", moments=True)
    with pytest.raises(ValueError, match="holds no first of llama/norm"):
        checkpoint.open_checkpoint(tmp_path / "a").tensors.read("first", ("llama", "norm"))


def test_a_sharded_part_is_put_together_with_its_base(one, tmp_path, manifest, trees, tokenizer):
    origin = checkpoint.Base(str(one), checkpoint.fingerprint(one))
    mine = replace(manifest, parts=("projector",), base=origin)
    save(tmp_path / "own", mine, trees[1], None, tokenizer.model, (3, 1))
    merged = checkpoint.load_model(tmp_path / "own").params
    assert torch.equal(merged["projector", "w1"], trees[1]["projector", "w1"])
    assert torch.equal(merged["llama", "embed"], trees[0]["llama", "embed"])
    leaves = open_source(tmp_path / "own").leaves
    assert torch.equal(leaves["projector/w1"].read(), trees[1]["projector", "w1"])
    assert torch.equal(leaves["llama/embed"].read(), trees[0]["llama", "embed"])


def test_a_run_resumes_from_shares(saved, manifest, trees, tiny, tokenizer):
    run = Run(saved.parent, Saving(), replace(manifest, step=0), tokenizer.model, Zero(llava.spec(tiny)))
    state = run.resume(saved, trees[0])
    assert state.step == 7
    same(state.params, trees[0])
    same(state.moments.second, trees[2])


# Damage.


def read_all(folder, manifest):
    reader = checkpoint.open_checkpoint(folder).tensors
    for kind in boxes.KINDS:
        for path, _ in spec.leaves(checkpoint.spec_of(manifest)):
            reader.read(kind, path)


@pytest.mark.parametrize("name", ["params-00002.safetensors", "optim-00001.safetensors"])
def test_a_flipped_bit_of_a_box_is_refused_by_file_and_tensor(saved, tmp_path, name, manifest):
    folder = copy(saved, tmp_path)
    content = (folder / name).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rows = {key: row["data_offsets"] for key, row in json.loads(content[8:start]).items() if key[0] != "_"}
    rng = torch.Generator().manual_seed(len(name))
    for place in {start, len(content) - 1, *torch.randint(start, len(content), (12,), generator=rng).tolist()}:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (folder / name).write_bytes(changed)
        (key,) = [key for key, (a, b) in rows.items() if a <= place - start < b]
        with pytest.raises(ValueError, match="is damaged: its CRC-32") as caught:
            read_all(folder, manifest)
        assert f"{folder / name}: {key} is damaged" in str(caught.value)
        with pytest.raises(ValueError, match=f"000007 is damaged: .*{name}"):
            checkpoint.load(folder)


def test_damage_elsewhere_does_not_keep_a_rank_from_its_boxes(saved, tmp_path, trees):
    folder = copy(saved, tmp_path)
    content = bytearray((folder / "params-00003.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "params-00003.safetensors").write_bytes(content)
    box = ((0, 100), (0, 16))
    reader = checkpoint.open_checkpoint(folder).tensors
    assert torch.equal(reader.read("params", ("llama", "embed"), box), trees[0]["llama", "embed"][:100])


def test_a_flipped_bit_of_a_header_is_refused_or_changes_nothing(saved, tmp_path, manifest):
    folder, name = copy(saved, tmp_path), "params-00001.safetensors"
    content = (folder / name).read_bytes()
    refused = 0
    for place in range(0, 8 + int.from_bytes(content[:8], "little"), 97):
        changed = bytearray(content)
        changed[place] ^= 4
        (folder / name).write_bytes(changed)
        try:
            read_all(folder, manifest)
        except ValueError as error:
            refused += 1
            assert str(folder / name) in str(error)
    assert refused > 20


@pytest.mark.parametrize("name", ["SHA256SUMS", "boxes.json", "manifest.json", "tokenizer.model"])
def test_a_flipped_bit_beside_the_boxes_is_refused_when_they_are_opened(saved, tmp_path, name):
    folder = copy(saved, tmp_path)
    content = (folder / name).read_bytes()
    said = content.decode("latin1").splitlines(True)
    small = [i for i, line in enumerate(said) if "safetensors" not in line]
    in_small = [sum(map(len, said[:i])) + at for i in small for at in (0, 40, 66)] if name == "SHA256SUMS" else []
    for place in in_small or [0, len(content) // 3, len(content) // 2, len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match="000007 is damaged: SHA256SUMS does not agree with") as caught:
            checkpoint.open_checkpoint(folder)
        assert name in str(caught.value) or name == "SHA256SUMS"


def test_files_that_are_missing_or_foreign_are_named(saved, tmp_path):
    for name in sorted(p.name for p in saved.iterdir()):
        folder = copy(saved, tmp_path)
        (folder / name).unlink()
        for read in (checkpoint.open_checkpoint, checkpoint.load):
            with pytest.raises(ValueError, match=f"000007 .*{name}"):
                read(folder)
        shutil.rmtree(folder)
    folder = copy(saved, tmp_path)
    shutil.copy(folder / "params-00003.safetensors", folder / "params-00004.safetensors")
    for read in (checkpoint.open_checkpoint, checkpoint.load):
        with pytest.raises(ValueError, match="damaged: SHA256SUMS does not agree with params-00004.safetensors"):
            read(folder)


def test_a_damaged_file_of_one_process_is_refused_when_a_box_of_it_is_read(one, tmp_path, manifest):
    folder = copy(one, tmp_path)
    for name, kind in (("params.safetensors", "params"), ("optim.safetensors", "second")):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256 is not that of the checkpoint"):
            checkpoint.open_checkpoint(folder).tensors.read(kind, ("llama", "norm"))


def forge(folder, change) -> None:
    """Change boxes.json and make the sums agree again."""
    values = json.loads((folder / "boxes.json").read_text())
    change(values)
    (folder / "boxes.json").write_text(json.dumps(values))
    (folder / "SHA256SUMS").write_text(checkpoint.sums(folder))


def widest(values):
    return next(t for t in values["tilings"] if t["shape"] == [512, 16])["boxes"]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda v: widest(v).pop(), r"boxes.json: params of llama/embed: \[384:512,0:16\] is in no file"),
        (
            lambda v: widest(v)[1].__setitem__(1, [[100, 256], [0, 16]]),
            r"\[100:128,0:16\] is in params-00000.* and par",
        ),
        (
            lambda v: v["tensors"]["params"].pop("llama/norm"),
            r"not fit its manifest: params: missing \['llama/norm'\], unexpected \[\]",
        ),
        (
            lambda v: v["tensors"]["params"].update(x=v["tensors"]["params"]["llama/norm"]),
            r"not fit its manifest: params: missing \[\], unexpected \['x'\]",
        ),
        (lambda v: v.update(format=2), r"boxes.json: its format 2 is not known"),
        (lambda v: v.pop("tilings"), r"boxes.json: KeyError\('tilings'\)"),
        (lambda v: widest(v)[0].__setitem__(0, 3), r"00003.safetensors: llama/embed\|0:128,0:16 is not in it"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(saved, tmp_path, change, said, manifest):
    folder = copy(saved, tmp_path)
    forge(folder, change)
    with pytest.raises(ValueError, match=said):
        read_all(folder, manifest)
    with pytest.raises(ValueError, match=said):
        checkpoint.load(folder)


# Committing.


def test_ranks_that_wrote_nothing_are_named(tmp_path, manifest, trees, tokenizer):
    folder = tmp_path / "000007"
    save(folder, manifest, trees[0], None, tokenizer.model, (2, 1), commit=False)
    with pytest.raises(TimeoutError, match=r"000007 is not committed: no share of ranks 2, 3 of 4 after 0.05 s"):
        shares.commit(folder, 4, manifest, tokenizer.model, 0.05)
    assert checkpoint.steps(tmp_path) == []


def spoilt(change, tmp_path, manifest, trees, tokenizer, moments=True):
    """The error of a commit of two ranks, the second of which wrote change(params, first, second)."""
    folder = tmp_path / "000007"
    for rank in range(2):
        of = [pieces(t, manifest.model, manifest.parts, (2, rank), (1, 0)) for t in trees]
        of = change(*of) if rank else of
        shares.write_share(folder, rank, of[0], tuple(of[1:]) if of[1:] else None)
    with pytest.raises(ValueError, match="000007 is not committed: ") as caught:
        shares.commit(folder, 2, manifest, tokenizer.model, 0.1)
    assert checkpoint.steps(tmp_path) == []
    return str(caught.value).partition("committed: ")[2]


def test_holes_overlaps_and_strangers_are_named(tmp_path, manifest, trees, tokenizer):
    norm = ("llama", "norm")

    def without(ps):
        return [p for p in ps if p.path != norm]

    def with_norm(ps, path, shape, start, stop):
        return [*without(ps), Piece(path, shape, ((start, stop),), torch.zeros(stop - start))]

    in_both = "params-00000.safetensors and params-00001.safetensors"
    cases = {
        "params of llama/norm: [8:16] is in no file": lambda p, *m: (without(p), *m),
        "params of llama/norm: [8:10] is in no file": lambda p, *m: (with_norm(p, norm, (16,), 10, 16), *m),
        f"params of llama/norm: [7:8] is in {in_both}": lambda p, *m: (with_norm(p, norm, (16,), 7, 16), *m),
        "second of llama/norm: [8:16] is in no file": lambda p, a, b: (p, a, without(b)),
        "first of vision/patch: [8:16,0:192] is in no file": lambda p, *_: (p,),
        "rank 1 wrote llama/norm of shape (17,), which is (16,)": lambda p, *m: (with_norm(p, norm, (17,), 8, 16), *m),
        "rank 1 wrote x of shape (16,), which the model lacks": lambda p, *m: (with_norm(p, ("x",), (16,), 8, 16), *m),
        "params of llama/norm: [8:16] is in params-00001.safetensors and params-00001.safetensors": (
            lambda p, *m: (p + [q for q in p if q.path == norm], *m)
        ),
    }
    for i, (said, change) in enumerate(cases.items()):
        assert said in spoilt(change, tmp_path / str(i), manifest, trees, tokenizer)


@pytest.mark.parametrize("name", ["params-00007.safetensors", "share-00002.json", "params-00001.safetensors"])
def test_a_file_among_the_shares_that_does_not_belong_or_is_gone_is_named(tmp_path, manifest, trees, tokenizer, name):
    folder = tmp_path / "000007"
    save(folder, manifest, trees[0], None, tokenizer.model, (2, 1), commit=False)
    path = tmp_path / ".part-000007-shares" / name
    path.unlink() if path.exists() else path.write_text("x")
    with pytest.raises(ValueError, match=f"000007 is not committed: {name}"):
        shares.commit(folder, 2, manifest, tokenizer.model, 0.1)
    assert list(tmp_path.iterdir()) == []


def test_shares_of_another_attempt_never_mix(tmp_path, manifest, trees, tokenizer):
    folder, spec_of = tmp_path / "000007", (manifest.model, manifest.parts)
    for rank in range(2):  # a start that died before its commit
        shares.write_share(folder, rank, pieces(trees[1], *spec_of, (2, rank), (1, 0)), None, "a")
    shares.write_share(folder, 0, pieces(trees[0], *spec_of, (2, 0), (1, 0)), None, "b")
    with pytest.raises(TimeoutError, match="no share of ranks 1 of 2"):
        shares.commit(folder, 2, manifest, tokenizer.model, 0.05, "b")
    shares.write_share(folder, 1, pieces(trees[0], *spec_of, (2, 1), (1, 0)), None, "b")
    shares.commit(folder, 2, manifest, tokenizer.model, 0.05, "b")
    same(checkpoint.load(folder).params, trees[0])
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000007"]


def test_a_second_share_waits_for_the_first_commit(tmp_path, manifest, trees, tokenizer):
    folder = tmp_path / "000007"
    save(folder, manifest, trees[0], None, tokenizer.model, (2, 1), commit=False)
    with pytest.raises(ValueError, match="rank 0 has already written its share of .*000007"):
        save(folder, manifest, trees[1], None, tokenizer.model, (2, 1))
    shares.commit(folder, 2, manifest, tokenizer.model, 0.1)
    same(checkpoint.load(folder).params, trees[0])
    save(folder, manifest, trees[1], None, tokenizer.model, (3, 1))  # replaces it
    same(checkpoint.load(folder).params, trees[1])


def test_a_rank_may_hold_nothing(tmp_path, manifest, trees, tokenizer):
    folder = tmp_path / "000007"
    save(folder, manifest, trees[0], trees[1:], tokenizer.model, (2, 1), commit=False)
    empty = Piece(("llama", "norm"), (16,), ((16, 16),), torch.zeros(0))
    shares.write_share(folder, 2, [empty], None)
    shares.commit(folder, 3, manifest, tokenizer.model, 0.1)
    same(checkpoint.load(folder, moments=True).params, trees[0])
    assert not (folder / "params-00002.safetensors").exists()


def test_a_full_disk_is_an_error_that_leaves_no_share(saved, tmp_path, manifest, trees, tokenizer):
    folder = copy(saved, tmp_path)
    for limit in (1000, (saved / "params-00000.safetensors").stat().st_size + 100):  # the first file, the second
        with largest_file(limit), pytest.raises(OSError, match=r"could not write .*0.safetensors \(.*MiB free\)"):
            save(folder, manifest, trees[1], trees[1:], tokenizer.model, (2, 2))
        with pytest.raises(TimeoutError, match="no share of ranks 0, 1, 2, 3 of 4"):
            shares.commit(folder, 4, manifest, tokenizer.model, 0.0)
    same(checkpoint.load(folder).params, trees[0])
    save(folder, manifest, trees[1], trees[1:], tokenizer.model, (2, 2))
    same(checkpoint.load(folder).params, trees[1])


def test_an_interrupt_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(
    tmp_path, monkeypatch, manifest, trees, tokenizer
):
    old = replace(manifest, parts=("projector",))
    new, outcomes = replace(old, recipe={"new": True}), []
    save(tmp_path / "old", old, trees[0], None, tokenizer.model, (2, 1))
    again = partial(save, manifest=new, params=trees[1], moments=None, tokenizer=tokenizer.model, mesh=(2, 1))
    for folder in interrupted(tmp_path / "old", tmp_path, monkeypatch, again):
        loaded = checkpoint.load(folder)
        outcomes.append(loaded.manifest == new)
        same(loaded.params, trees[outcomes[-1]].select("projector"))
    assert len(outcomes) > 30 and outcomes == sorted(outcomes) and {*outcomes} == {False, True}


# In the background.


def test_one_job_at_a_time_runs_beside_its_caller():
    go, order = [threading.Event(), threading.Event()], []

    def job(number):
        go[number].wait(10)
        order.append(f"end {number}")

    with Background() as saver:
        saver.start("step 1", partial(job, 0))
        order.append("caller")
        threading.Timer(0.05, go[0].set).start()
        saver.start("step 2", partial(job, 1))  # waits for step 1
        order.append("caller")
        go[1].set()
    assert order == ["caller", "end 0", "caller", "end 1"]


def fail(error):
    raise error


@pytest.mark.parametrize(
    "error, kind", [(OSError("full"), OSError), (TimeoutError("late"), OSError), (KeyError("x"), RuntimeError)]
)
def test_an_error_in_the_background_comes_once_with_the_name_of_its_step(error, kind):
    saver, ran = Background(), []
    saver.start("step 100", partial(fail, error))
    with pytest.raises(kind, match="step 100: .*(full|late|x)") as caught:
        saver.start("step 200", partial(ran.append, 1))
    assert caught.value.__cause__ is error and not ran
    saver.start("step 200", partial(ran.append, 1))
    saver.join()
    assert ran == [1]
    with pytest.raises(kind, match="step 300"), saver:
        saver.start("step 300", partial(fail, error))


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_background(capsys):
    with pytest.raises(ArithmeticError, match="loss"), Background() as saver:
        saver.start("step 100", partial(fail, OSError("full")))
        raise ArithmeticError("loss")
    assert capsys.readouterr().err == "error: step 100: full\n"
    done = []
    with pytest.raises(ArithmeticError), Background() as saver:
        saver.start("step 200", lambda: (time.sleep(0.05), done.append(1)))
        raise ArithmeticError("loss")
    assert done == [1]


def test_a_checkpoint_is_written_in_the_background(tmp_path, manifest, trees, tokenizer):
    folder = tmp_path / "000007"
    with Background() as saver:
        saver.start("step 7", lambda: save(folder, manifest, trees[0], trees[1:], tokenizer.model, (2, 1)))
    same(checkpoint.load(folder, moments=True).moments[1], trees[2])


def test_copied_pieces_do_not_change_with_training():
    value = torch.arange(6.0).view(3, 2).requires_grad_()
    whole = Piece(("a",), (3, 2), boxes.whole((3, 2)), value)
    half = Piece(("a",), (3, 2), ((0, 2), (1, 2)), value[:2, 1:])
    copies = shares.copied([whole, half])
    value.detach().zero_()
    assert copies[0].value.tolist() == [[0, 1], [2, 3], [4, 5]] and copies[1].value.tolist() == [[1], [3]]
    assert [(p.path, p.shape, p.box) for p in copies] == [(p.path, p.shape, p.box) for p in (whole, half)]
    assert not copies[0].value.requires_grad


# Out to other layouts.


def exported(source, folder):
    """Every file that a source becomes in all layouts, name -> SHA-256."""
    files = []
    for layout in export.LAYOUTS:
        export.export(source, folder / layout, layout)
        files += [folder / layout] if layout == "mm_projector" else (folder / layout).iterdir()
    return {str(p.relative_to(folder)): boxes.digest(p) for p in files}


def test_shares_of_any_mesh_go_out_to_every_layout_as_the_whole_does(tmp_path, one, manifest, trees, tokenizer):
    want = exported(open_source(one), tmp_path / "whole")
    assert len(want) > 12 and len(export.LAYOUTS) == 4
    for mesh in ((3, 1), (1, 2), (5, 2)):
        name = f"{mesh[0]}x{mesh[1]}"
        save(tmp_path / "ckpt" / name, manifest, trees[0], trees[1:], tokenizer.model, mesh)
        assert exported(open_source(tmp_path / "ckpt" / name), tmp_path / name) == want


def test_an_export_holds_few_tensors_at_a_time(saved, tmp_path, monkeypatch):
    read, alive, most = boxes.Reader.read, weakref.WeakSet(), []

    def counted(*args):
        out = read(*args)
        alive.add(out)
        most.append(len(alive))
        return out

    monkeypatch.setattr(boxes.Reader, "read", counted)
    exported(open_source(saved), tmp_path / "out")
    assert len(most) > 100 and max(most) <= 5  # the projector has four, and is pickled as a whole


# Kills.


def test_the_folder_of_shares_may_be_moved_as_soon_as_the_last_has_appeared(tmp_path, monkeypatch):
    rename = Path.rename

    def seen_at_once(path, target):
        rename(path, target)
        if Path(target).name == "share-00000.json":
            rename(Path(target).parent, tmp_path / "moved")

    monkeypatch.setattr(Path, "rename", seen_at_once)
    shares.write_share(tmp_path / "000004", 0, [], None)
    assert (tmp_path / "moved/share-00000.json").exists()


def test_kills_leave_whole_checkpoints_only(tmp_path):
    script = Path(__file__).with_name("checkpoint_kills.py")
    done = subprocess.run([sys.executable, script, tmp_path, "10"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"10 kills, [1-9]\d* of them in the midst of a save; [1-9]\d* checkpoints were whole", done.stdout)
