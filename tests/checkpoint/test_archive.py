"""Files of tensors read back bit for bit, in every format; what is not weights is refused and never run."""

import argparse
import collections
import enum
import functools
import importlib.util
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import resident
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_fn.checkpoint.archive import open_archive, open_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, t in want.items():
        assert (got[name].dtype, got[name].shape) == (t.dtype, t.shape), name
        assert bits(got[name]) == bits(t), name


def noise(dtype: torch.dtype, *shape: int) -> Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape[:-1], shape[-1] * dtype.itemsize))
    return raw.to(torch.uint8).view(dtype)


def repack(path: Path, change=lambda name, data: data, order=list, how=zipfile.ZIP_STORED) -> None:
    """The same zip archive with other members; None leaves one out."""
    with zipfile.ZipFile(path) as file:
        members = [(name, change(name, file.read(name))) for name in order(file.namelist())]
    with zipfile.ZipFile(path, "w", how) as file:
        for name, data in members:
            if data is not None:
                file.writestr(name, data)


# ---- safetensors


def test_safetensors_of_every_dtype_equal_what_was_saved(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
             torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
             torch.bool, torch.complex64, torch.float8_e8m0fnu]  # fmt: skip
    want = {str(d): noise(d, 3, 5) for d in kinds}
    want |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "odd": noise(torch.uint8, 7)}
    save_file(want, tmp_path / "x.bin", metadata={"format": "pt"})  # the name says nothing
    same(open_archive(tmp_path / "x.bin").tensors, want)


@pytest.mark.parametrize("pad", range(8))
def test_safetensors_at_any_alignment_are_read(tmp_path, pad):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + b" " * pad
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    assert open_archive(path).tensors["w"].tolist() == [1.5, -2.0]


def test_a_type_of_number_that_torch_lacks_is_named(tmp_path):
    header = b'{"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"12")
    with pytest.raises(ValueError, match=r"x holds types of numbers that torch lacks: w is F4"):
        open_archive(tmp_path / "x")


# ---- torch.save


def varied() -> dict:
    base, tied = torch.randn(10, 10), nn.Parameter(torch.randn(6))
    return {
        "whole": base,
        "strided": base.t()[2:5, ::2],
        "half": torch.randn(4, 3).half().t(),
        "bf16": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "none": torch.empty(0, 4),
        "tied1": tied,
        "tied2": tied,
        "expanded": torch.randn(1, 4).expand(3, 4),
        "a.b": torch.randn(2),
    }


def test_torch_save_reads_views_parameters_and_shared_storages(tmp_path):
    want = collections.OrderedDict(varied())
    torch.save(want, tmp_path / "x.safetensors")
    got = open_archive(tmp_path / "x.safetensors").tensors
    same(got, want)
    assert got["tied1"].data_ptr() == got["tied2"].data_ptr()
    assert got["strided"].stride() == want["strided"].stride()
    assert got["strided"].data_ptr() == got["whole"].data_ptr() + 8
    assert not any(t.requires_grad for t in got.values())


def test_float8_of_torch_save_is_read(tmp_path):
    want = {"w": noise(torch.float8_e4m3fn, 3, 3), "x": torch.randn(3)}
    torch.save(want, tmp_path / "x.pt")
    same(open_archive(tmp_path / "x.pt").tensors, want)


def test_nested_dicts_are_joined_and_what_is_no_tensor_is_left_out(tmp_path):
    inner, w = torch.randn(3), torch.randn(2)
    content = {"model": {"a.w": w, "deep": {"x": inner, "n": 3}}, "iteration": 5, "name": "x", "nothing": None,
               "list": [1, w], "tuple": (w,), "state": {0: {"step": torch.tensor(2.0)}}, "dtype": torch.float16,
               "size": torch.Size([1]), "set": {1}, "bytes": b"x", "complex": 1j}  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    same(
        open_archive(tmp_path / "x.pt").tensors,
        {"model/a.w": w, "model/deep/x": inner, "state/0/step": torch.tensor(2.0)},
    )


def test_legacy_torch_save_is_read_into_memory(tmp_path):
    want = varied()
    path = tmp_path / "x.safetensors"
    torch.save(want | {"n": {"w": want["bf16"]}, "k": 3}, path, _use_new_zipfile_serialization=False)
    got = open_archive(path)
    assert not any(t.requires_grad for t in got.tensors.values())
    same(got.tensors, want | {"n/w": want["bf16"]})
    got.release()
    same(got.tensors, want | {"n/w": want["bf16"]})


@pytest.mark.parametrize("old", [False, True])
def test_two_tensors_of_one_name_are_refused(tmp_path, old):
    content = {"a": {"w": torch.ones(1)}, "a/w": torch.zeros(1)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"x.pt holds two tensors that are both called a/w"):
        open_archive(tmp_path / "x.pt")


def test_a_tensor_without_a_name_and_one_that_is_not_dense_are_refused(tmp_path):
    torch.save(torch.ones(2), tmp_path / "one.pt")
    with pytest.raises(ValueError, match="one.pt holds a Tensor, not a dict of tensors"):
        open_archive(tmp_path / "one.pt")
    conjugate = torch.ones(2, dtype=torch.complex64).conj()
    for kind, t in {"sparse": torch.eye(2).to_sparse(), "lazy": conjugate}.items():
        torch.save({"w": t}, tmp_path / f"{kind}.pt")
        with pytest.raises(ValueError, match=f"{kind}.pt holds w sparse, quantized, nested or lazily conj"):
            open_archive(tmp_path / f"{kind}.pt")


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    content = {"w": torch.ones(1)}
    content["me"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt holds me, which holds itself"):
        open_archive(tmp_path / "x.pt")


def test_a_repacked_file_is_read_right_or_refused(tmp_path):
    want = {"a": torch.randn(64), "b": torch.randn(64), "c": torch.randn(64)}
    path = tmp_path / "x.pt"
    torch.save(want, path)
    repack(path, order=lambda names: names[::-1])
    with pytest.raises(ValueError, match="x.pt was packed anew, in another order"):
        open_archive(path)
    torch.save(want, path)
    repack(path)
    with pytest.raises(ValueError, match="x.pt does not hold b where torch says"):
        open_archive(path)
    repack(path, lambda name, data: None if name.endswith(".format_version") else data, lambda names: names[::-1])
    same(open_archive(path).tensors, want)  # as torch before 2.7 wrote it: each storage is looked up


def test_compressed_and_byte_swapped_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(500)}, path)
    repack(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(ValueError, match="x.pt was saved on a machine of the other byte order"):
        open_archive(path)
    repack(path, how=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"x.pt is compressed \(x/data.pkl is\)"):
        open_archive(path)


# ---- Megatron


@pytest.fixture
def megatron(monkeypatch):
    """Writes a file as Megatron does; what it names cannot be imported afterwards."""

    def write(path: Path, **more) -> dict[str, Tensor]:
        names = {"megatron.core.enums": "ModelType", "megatron.core.transformer.enums": "AttnMaskType",
                 "mindspeed_mm.configs.config": "ConfigReader"}  # fmt: skip
        made = {}
        for module, name in names.items():
            kind = types.new_class(name) if name == "ConfigReader" else enum.Enum(name, ["one", "two"])
            kind.__module__, kind.__qualname__ = module, name
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(module))
            setattr(sys.modules[module], name, kind)
            made[name] = kind
        reader = made["ConfigReader"]()
        reader.hidden_size, reader.w = 8, torch.ones(3)
        args = argparse.Namespace(mask=made["AttnMaskType"].two, mm=reader, dtype=torch.bfloat16, lr=1e-3)
        model = {"image_encoder": {"ln.weight": torch.randn(3)}, "text_decoder": {"w": torch.randn(2, 2).bfloat16()}}
        rng = [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}]  # fmt: skip
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 5, "model": model, "rng_state": rng,
                   "kind": made["ModelType"].one, "optimizer": {"state": {0: {"exp_avg": torch.randn(4)}}},
                   "opt_param_scheduler": {"max_lr": np.float64(1e-3)}}  # fmt: skip
        torch.save(content | more, path)
        monkeypatch.undo()
        return {
            "model/image_encoder/ln.weight": model["image_encoder"]["ln.weight"],
            "model/text_decoder/w": model["text_decoder"]["w"],
            "optimizer/state/0/exp_avg": content["optimizer"]["state"][0]["exp_avg"],
        }

    return write


def test_megatrons_checkpoint_is_read_without_megatron(tmp_path, megatron):
    path = tmp_path / "model_optim_rng.pt"
    want = megatron(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # so stand-ins are what makes it readable
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    before = set(torch.serialization.get_safe_globals())
    same(open_archive(path).tensors, want)
    assert set(torch.serialization.get_safe_globals()) == before
    assert "megatron" not in sys.modules and "megatron.core.enums" not in sys.modules


# ---- what would run code


class Trap:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def traps(marker: Path) -> dict[str, Trap]:
    """Each makes the marker, under the name that pickle protocol 2 gives it."""
    return {
        f"{os.name}.system": Trap(os.system, f"touch {marker}"),
        "builtins.eval": Trap(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Trap(exec, f"open({str(marker)!r}, 'w')"),
        "commands.check_output": Trap(subprocess.check_output, ["touch", str(marker)]),
        "builtins.getattr": Trap(Path.touch, marker),
    }


TRAPS = list(traps(Path("x")))


def refused(path: Path, name: str, marker: Path) -> None:
    said = rf"{re.escape(str(path))} names .*{re.escape(name)}.*would run code.*get these weights as safetensors"
    with pytest.raises(ValueError, match=said) as caught:
        open_archive(path)
    assert "weights_only" not in str(caught.value)  # torch's advice is to switch it off
    assert not marker.exists()


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, name, old):
    path, marker = tmp_path / "x.bin", tmp_path / "ran"
    content = {"w": torch.ones(2), "more": [traps(marker)[name]]}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    refused(path, name.removeprefix("builtins.") if old else name, marker)
    torch.load(path, weights_only=False)
    assert marker.exists(), "this trap is none"


@pytest.mark.parametrize(
    "name, harmless",
    [
        ("functools.partial", functools.partial(print, "x")),
        ("builtins.getattr", Trap(getattr, "x", "upper")),
        ("torch.serialization.load", Trap(torch.load, "x")),
        ("torch.nn.modules.linear.Linear", nn.Linear(1, 1)),
        ("megatronic.f", None),
        ("posix.system", None),
    ],
)
def test_no_global_but_the_listed_ones_is_stood_in_for(tmp_path, name, harmless):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2), "more": harmless}, path)
    if harmless is None:
        module, _, function = name.rpartition(".")
        named = pickle.PROTO + b"\x02}X\x01\x00\x00\x00kc" + f"{module}\n{function}\n".encode() + b"s."
        repack(path, lambda member, data: named if member.endswith("data.pkl") else data)
    refused(path, name, tmp_path / "none")


def test_a_trap_beside_what_megatron_names_is_refused(tmp_path, megatron):
    path, marker = tmp_path / "model_optim_rng.pt", tmp_path / "ran"
    for name in (f"{os.name}.system", "builtins.eval"):
        megatron(path, rng_state=[traps(marker)[name]])
        refused(path, name, marker)


def test_stand_ins_never_call_numpy(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "x.pt"
    # An object array carries a pickle of its own, and numpy's scalar() would load it.
    inner = pickle.dumps(Trap(os.system, f"touch {marker}"))
    torch.save({"w": torch.ones(2), "x": Trap(np._core.multiarray.scalar, np.dtype("O"), inner)}, path)
    same(open_archive(path).tensors, {"w": torch.ones(2)})
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_of_pickle_are_no_way_round(tmp_path, protocol):
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": traps(marker)[f"{os.name}.system"]}, path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"x.pt .*get these weights as safetensors"):
        open_archive(path)
    assert not marker.exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(traps(marker)[f"{os.name}.system"], protocol))
    with pytest.raises(ValueError, match="plain.pkl"):
        open_archive(tmp_path / "plain.pkl")
    assert not marker.exists()


# ---- TorchScript


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("scale", torch.tensor(3))
        self.mask = torch.ones(width)  # neither a parameter nor a buffer
        self.count, self.on, self.name, self.sizes, self.more = 3, True, "x", [1, 2], [torch.ones(2)]
        self.rates, self.flags, self.table, self.where = [0.5], [True], {"a": 1}, torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) * self.mask * self.count * self.rates[0] + self.more[0].sum() + self.table["a"]
        return y * self.scale if self.on else y


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.proj = nn.Parameter(torch.randn(4, 6).t()[1:3])  # strided
        self.register_buffer("mean", torch.randn(3, dtype=torch.float64))
        for p in self.parameters():
            p.data = p.data + torch.randn_like(p)
        self.blocks[1].attn.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.blocks(x))) + self.proj.sum() + self.mean.sum().float()


def script(path: Path, how: str = "script") -> dict[str, Tensor]:
    model = Model()
    with torch.no_grad():
        made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 8))
    torch.jit.save(made, path)
    return model.state_dict()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_reads_like_its_state_dict(tmp_path, how, monkeypatch):
    want = script(tmp_path / "x.pt", how)
    assert {t.dtype for t in want.values()} == {torch.float16, torch.float32, torch.float64, torch.int64}
    assert "blocks.1.attn.in_proj_weight" in want and want["blocks.0.scale"].shape == ()
    monkeypatch.setattr(torch.jit, "load", None)
    got = open_archive(tmp_path / "x.pt").tensors
    same(got, want)
    assert got["tied.weight"].data_ptr() == got["head.weight"].data_ptr()


def test_nothing_of_the_code_in_torchscript_matters_but_the_lists_of_names(tmp_path):
    path = tmp_path / "x.pt"
    want = script(path)
    repack(path, lambda name, data: data + b"\nraise SystemExit\n" if name.endswith(".py") else data)
    same(open_archive(path).tensors, want)
    repack(path, lambda name, data: b"" if name.endswith(".py") else data)
    masks = {f"blocks.{i}.mask": torch.ones(8) for i in (0, 1)}
    same(open_archive(path).tensors, want | masks)  # no lists: every tensor of a module counts


def test_torchscript_of_openai_clip_reads_like_its_state_dict(tmp_path):
    folder = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
    module = importlib.util.spec_from_file_location("clip_model", folder / "model.py")
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    model = loaded.CLIP(16, 28, 2, 128, 7, 8, 50, 64, 1, 1).eval()
    loaded.convert_weights(model)  # the published mix of fp16 and fp32
    for name, value in {"input_resolution": 28, "context_length": 8, "vocab_size": 50}.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = (torch.randn(1, 3, 28, 28), torch.randint(1, 50, (1, 8)))
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), tmp_path / "ViT.pt")
    got = open_archive(tmp_path / "ViT.pt").tensors
    same(got, model.state_dict())
    assert got["visual.transformer.resblocks.0.attn.in_proj_weight"].dtype == torch.float16
    assert got["visual.ln_pre.weight"].dtype == torch.float32 and got["input_resolution"].item() == 28


def call(module: str, name: str, text: str) -> bytes:
    """The opcodes that call a global with one string."""
    return (
        f"c{module}\n{name}\n".encode()
        + b"("
        + pickle.BINUNICODE
        + struct.pack("<I", len(text))
        + text.encode()
        + b"tR"
    )


@pytest.mark.parametrize(
    "module, name",
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "exec"),
     ("torch.jit._pickle", "restore_type_tag.__globals__"), ("torch", "load"), ("copyreg", "_reconstructor"),
     ("torch._utils", "_rebuild_tensor_v2.__class__")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["whole", "hidden"])
def test_torchscript_that_would_run_code_is_refused(tmp_path, module, name, where):
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    script(path)
    text = f"touch {marker}" if name == "system" else f"open({str(marker)!r}, 'w')"
    danger = call(module, name, text)

    def plant(member: str, data: bytes) -> bytes:
        if not member.endswith("/data.pkl"):
            return data
        return b"\x80\x02" + danger + (b"." if where == "whole" else b"0" + data[2:])

    repack(path, plant)
    refused(path, f"{module}.{name}", marker)


def test_the_trap_in_torchscript_is_one(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(b"\x80\x02" + call("os", "system", f"touch {marker}") + b".")
    assert marker.exists()


def test_a_pickle_cannot_change_the_classes_that_read_it(tmp_path):
    path = tmp_path / "x.pt"
    want = script(path)
    # BUILD with a pair sets attributes: here of a class, so that later modules would be packed.
    state = b"c__torch__\nM\nN}X\x0c\x00\x00\x00__setstate__ctorch\ndevice\ns\x86b0"
    repack(path, lambda member, data: b"\x80\x02" + state + data[2:] if member.endswith("/data.pkl") else data)
    try:
        same(open_archive(path).tensors, want)
    except ValueError as error:
        assert str(path) in str(error)
    script(tmp_path / "other.pt")
    assert open_archive(tmp_path / "other.pt").tensors


def test_damaged_torchscript_gives_a_value_error_whatever_byte_it_is(tmp_path):
    path, rng, seen = tmp_path / "x.pt", random.Random(0), 0
    script(path)
    with zipfile.ZipFile(path) as file:
        whole = file.read("x/data.pkl")
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        repack(path, lambda member, data, new=bytes(broken): new if member.endswith("/data.pkl") else data)
        try:
            open_archive(path)
        except ValueError as error:
            seen += str(error).startswith(str(path))
    assert seen > 30


@pytest.mark.parametrize(
    "asks, said",
    [
        (b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "RecursionError"),  # a module in itself
        (
            b"c__torch__\nM\n)\x81}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
            b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQK\x01K\x08\x85K\x01\x85\x89}tRsb.",
            "out of bounds for storage of size 32",  # 8 numbers from the second of 8 on
        ),
    ],
)
def test_a_pickle_that_asks_for_more_than_there_is_is_refused(tmp_path, asks, said):
    path = tmp_path / "x.pt"
    script(path)
    repack(path, lambda member, data: b"\x80\x02" + asks if member.endswith("/data.pkl") else data)
    with pytest.raises(ValueError, match=rf"x.pt \(\d+ bytes\) is truncated or damaged .*{said}"):
        open_archive(path)


def test_compressed_and_short_storages_of_torchscript_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    script(path)
    repack(path, lambda member, data: data[:-4] if member.endswith("/data/3") else data)
    with pytest.raises(ValueError, match=r"x.pt .* is truncated or damaged .*storage 3 is \d+ bytes long"):
        open_archive(path)
    repack(path, lambda member, data: None if member.endswith("/data/3") else data)
    with pytest.raises(ValueError, match=r"x.pt .* is truncated or damaged .*KeyError"):
        open_archive(path)
    repack(path, how=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"x.pt is compressed \(x/data/0 is\)"):
        open_archive(path)


# ---- files that are something else


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", r"\(0 bytes\) is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:3035\nsize 9\n",
            r"is a Git LFS pointer, which stands in place of the file; download the file itself",
        ),
        (b"\n<!DOCTYPE html><html>Not found</html>", r"\(38 bytes\) is a web page"),
        (b"<?xml version='1.0'?><Error/>", "is a web page"),
        (b"GGUF" + bytes(40), "is neither safetensors"),
        (b"\x93NUMPY" + bytes(40), "is neither safetensors"),
        (bytes(64), "is neither safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "is neither safetensors"),
        (pickle.dumps({"w": 1}), "is a pickle that torch.save did not write"),
        (struct.pack("<Q", 500) + b'{"w":', r"\(13 bytes\) is truncated or damaged"),
        (b"PK\x03\x04", r"\(4 bytes\) is truncated or damaged"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_file_of_weights_is_named_with_its_size_and_remedy(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} \({len(content)} bytes\)") as caught:
        open_archive(tmp_path / name)
    assert re.search(said, str(caught.value))


def test_missing_files_and_other_zip_archives_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a file"):
        open_archive(tmp_path / "nowhere")
    np.savez(tmp_path / "x.npz", w=np.ones(2))
    with pytest.raises(ValueError, match="x.npz is a zip archive of something else"):
        open_archive(tmp_path / "x.npz")
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("x/data/0", b"1234")
    with pytest.raises(ValueError, match="x.pt holds x/data/0 twice"):
        open_archive(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "torchscript"])
def test_every_truncated_file_is_refused_by_name(tmp_path, kind):
    path, tensors = tmp_path / "x", {"a": torch.randn(300), "b": torch.randn(50)}
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "torchscript":
        script(path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    assert open_archive(path).tensors
    for size in {*range(0, len(whole), len(whole) // 40), len(whole) - 1, len(whole) - 8, 1, 8, 9, 16}:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            open_archive(path)


# ---- memory


@pytest.mark.parametrize("kind", ["safetensors", "zip", "torchscript"])
def test_pages_come_when_read_and_go_when_released(tmp_path, kind):
    path, size = tmp_path / "big", 128 * 2**20
    values = torch.arange(size // 4, dtype=torch.int32)
    if kind == "safetensors":
        save_file({"w": values}, path)
    elif kind == "zip":
        torch.save({"model": {"w": values}}, path)
    else:
        module = nn.Module()
        module.register_buffer("w", values)
        torch.jit.save(torch.jit.script(module), path)
    del values
    opened = open_archive(path)
    (t,) = opened.tensors.values()
    assert resident(path) < 2**20  # opening reads nothing
    first = t[: len(t) // 2].sum()
    assert 0.4 * size < resident(path) < 0.6 * size
    whole = t.sum()
    assert resident(path) > 0.99 * size
    opened.release()
    assert resident(path) < 2**20
    assert t[-1].item() == size // 4 - 1 and t.sum() == whole and t[: len(t) // 2].sum() == first


@pytest.mark.skipif(
    not Path("/proc/sys/vm/overcommit_memory").is_file()
    or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2",
    reason="this machine never maps more than its memory",
)
def test_a_file_larger_than_the_memory_is_opened(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "x").open("wb") as file:  # a hole: it takes no room on the disk
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size - 1, os.SEEK_CUR)
        file.write(b"\x07")
    assert open_archive(tmp_path / "x").tensors["w"][-2:].tolist() == [0, 7]


def test_tensors_outlive_the_archive_and_the_file(tmp_path):
    want = {"w": torch.randn(5000)}
    save_file(want, tmp_path / "x")
    got = open_archive(tmp_path / "x").tensors
    (tmp_path / "x").unlink()
    same(got, want)


def test_reading_warns_of_nothing(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a")
    torch.save({"w": torch.ones(2)}, tmp_path / "b")
    # In a process of its own, since torch warns once in each.
    program = "import sys; from llava_fn.checkpoint import archive; [archive.open_archive(p) for p in sys.argv[1:]]"
    command = [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")


# ---- folders


def shards(folder: Path, suffix: str = ".safetensors") -> dict[str, Tensor]:
    """Two files and their index."""
    parts = [{"a": torch.randn(3), "b": torch.randn(2, 2)}, {"c": torch.randn(4)}]
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    where = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05}-of-00002{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return parts[0] | parts[1]


def merged(folder: Path) -> dict[str, Tensor]:
    return {name: t for opened in open_folder(folder) for name, t in opened.tensors.items()}


def files(folder: Path) -> list[str]:
    return [opened.path.name for opened in open_folder(folder)]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_names_the_files(tmp_path, suffix):
    want = shards(tmp_path, suffix)
    torch.save({"z": torch.ones(1)}, tmp_path / "mm_projector.bin")  # not in the index
    same(merged(tmp_path), want)


def test_the_safetensors_index_goes_before_the_other(tmp_path):
    shards(tmp_path, ".bin")
    want = shards(tmp_path)
    same(merged(tmp_path), want)
    assert files(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_an_index_and_its_files_have_to_agree(tmp_path):
    shards(tmp_path)
    index, first, second = (tmp_path / name for name in ("model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))  # fmt: skip
    part = load_file(second)
    save_file({"d": torch.ones(1), "e": torch.ones(1)}, second)
    with pytest.raises(ValueError) as caught:
        open_folder(tmp_path)
    assert f"{index} and its files differ" in str(caught.value)
    for said in (f"c is not in {second.name} but in none", f"d is in {second.name} but not", f"e is in {second.name}"):
        assert said in str(caught.value)
    save_file(part, second)
    text = index.read_text()
    index.write_text(text.replace('"a": "model-00001', '"a": "model-00002'))
    with pytest.raises(ValueError, match=rf"a is not in {second.name} but in {first.name}"):
        open_folder(tmp_path)
    index.write_text(text)
    save_file(part | {"b": torch.ones(1)}, second)
    with pytest.raises(ValueError, match=rf"1 tensors are in two files: b in \S+/{first.name} and \S+/{second.name}"):
        open_folder(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=rf"index.json names files that are missing: {second.name}"):
        open_folder(tmp_path)


def test_a_second_index_and_a_broken_one_are_refused(tmp_path):
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.fp16.safetensors.index.json").write_bytes(index.read_bytes())
    with pytest.raises(
        ValueError, match="several indices of its weights: model.fp16.safetensors.index.json, model.saf"
    ):
        open_folder(tmp_path)
    (tmp_path / "model.fp16.safetensors.index.json").unlink()
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "version https://git-lfs\n"):
        index.write_text(text)
        with pytest.raises(
            ValueError,
            match="index.json(, line 1, column .*: Expecting| is not a JSON object| is no index| is a Git LFS)",
        ):
            open_folder(tmp_path)
    for outside in ("../x.safetensors", "/etc/passwd", "..", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match="its files have to be in its own folder"):
            open_folder(tmp_path)


def test_known_files_are_read_together_and_safetensors_first(tmp_path):
    for i, name in enumerate(["adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin",
                              "mm_projector.bin", "pytorch_model.bin", "other.safetensors"]):  # fmt: skip
        (save_file if name.endswith("safetensors") else torch.save)({f"t{i}": torch.ones(1)}, tmp_path / name)
    kept = ["adapter_model.safetensors", "non_lora_trainables.bin", "mm_projector.bin"]
    assert files(tmp_path) == ["pytorch_model.bin", *kept]
    save_file({"m": torch.ones(1)}, tmp_path / "model.safetensors")
    assert files(tmp_path) == ["model.safetensors", *kept]


def test_unknown_names_are_read_when_there_is_nothing_else(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "converted_clip.pt")
    torch.save({"b": torch.ones(1)}, tmp_path / "mlp.bin")
    assert files(tmp_path) == ["converted_clip.pt", "mlp.bin"]
    save_file({"c": torch.ones(1)}, tmp_path / "x.safetensors")
    assert files(tmp_path) == ["x.safetensors"]


def test_what_trainers_leave_behind_is_never_opened(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth",
                 "rng_state_0.pth", "rng_state.pt", "config.json", "tokenizer.model"):  # fmt: skip
        (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"holds no weights: no \*.index.json, none of model.safetensors, pytorch_mod"):
        open_folder(tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "x.bin")
    assert files(tmp_path) == ["x.bin"]
    with pytest.raises(ValueError, match="x.bin is not a folder"):
        open_folder(tmp_path / "x.bin")


def test_a_tensor_in_two_files_is_named_with_both(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(1), "c": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are in two files: b in \S+/1.safetensors and \S+/2.safetensors"):
        open_folder(tmp_path)
