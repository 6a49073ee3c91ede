"""Files that were damaged on their way: one flipped bit, a cut, a wrong sum, a pointer in place of a file."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import layouts
import pytest
import torch
from layouts import C
from safetensors.torch import load_file
from warm import recipe as module

from llava_fn.checkpoint import sums
from llava_fn.checkpoint.archive import open_archive
from llava_fn.files import digest
from llava_fn.weights import export, model
from llava_fn.weights.source import open_source

convert = module("convert")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def kinds(tokenizer, tmp_path_factory):
    """Kind -> a source, and the file of it that is damaged. Never write to them."""
    root, state = tmp_path_factory.mktemp("downloads"), layouts.hub(layouts.hf_model())
    vicuna = layouts.write_vicuna(root / "vicuna", state, "bin", tokenizer.model)
    clip, megatron, _ = layouts.write_mindspeed(root / "ms", state, C.vision.blocks, tokenizer.model)
    adapter, _ = layouts.write_lora(root / "lora", state, 4, 8)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    hf = layouts.write_llava_hf(root / "hf", state, "hub", tokenizer.model)
    projector = layouts.write_projector(root / "mm_projector.bin", state)
    openai = layouts.write_openai(root / "ViT-L-14-336px.pt", state)
    return {
        "mm_projector.bin": (projector, projector), "OpenAI's CLIP": (openai, openai),
        "a shard of Vicuna": (vicuna, vicuna / "pytorch_model-00002-of-00003.bin"),
        "MindSpeed-MM's CLIP": (clip, clip), "MindSpeed-MM's Vicuna": (megatron, megatron),
        "adapters": (adapter, adapter / "adapter_model.bin"),
        "the projector beside adapters": (adapter, adapter / "non_lora_trainables.bin"),
        "llava-hf": (hf, hf / "model.safetensors"),
    }  # fmt: skip


KINDS = ("mm_projector.bin", "OpenAI's CLIP", "a shard of Vicuna", "MindSpeed-MM's CLIP", "MindSpeed-MM's Vicuna",
         "adapters", "the projector beside adapters")  # fmt: skip


def copied(source: tuple[Path, Path], to: Path) -> tuple[Path, Path]:
    whole, file = source
    if whole.is_file():
        shutil.copy(whole, to / whole.name)
        return to / whole.name, to / whole.name
    shutil.copytree(whole, to / whole.name)
    return to / whole.name, to / whole.name / file.name


def flip(path: Path, at: int, bit: int = 1) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ bit]))


def members(path: Path, what: str) -> list[tuple[int, int]]:
    """(first byte, size) of the members whose name contains `what`."""
    with zipfile.ZipFile(path) as file, path.open("rb") as raw:
        out = []
        for info in file.infolist():
            raw.seek(info.header_offset + 26)
            head = raw.read(4)
            skip = int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
            out += [(info.header_offset + 30 + skip, info.file_size)] if what in info.filename else []
    return [row for row in out if row[1]]


def read_all(path: Path) -> None:
    source = open_source(path)
    for leaf in (*source.leaves.values(), *source.spare.values()):
        leaf.read()


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_in_the_numbers_of_an_archive_is_an_error_that_names_file_and_tensor(kind, kinds, tmp_path):
    source, file = copied(kinds[kind], tmp_path)
    read_all(source)
    first, size = max(members(file, "/data/"), key=lambda row: row[1])
    flip(file, first + size // 2)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: the CRC-32 of \S.* is not the one in it; get the"):
        read_all(source)
    flip(file, first + size // 2)
    read_all(source)


@pytest.mark.parametrize("kind", ["mm_projector.bin", "OpenAI's CLIP"])
@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "/code/__torch__.py"])
def test_one_flipped_bit_elsewhere_in_an_archive_is_an_error(kind, member, kinds, tmp_path):
    source, file = copied(kinds[kind], tmp_path)
    found = members(file, member)
    if not found:
        pytest.skip(f"{kind} has no {member}")
    for at in (0, found[0][1] // 2, found[0][1] - 1):
        flip(file, found[0][0] + at, 4)
        with pytest.raises(ValueError, match=file.name):
            read_all(source)
        flip(file, found[0][0] + at, 4)


def test_a_conversion_of_a_damaged_file_leaves_nothing(kinds, tmp_path):
    vicuna, file = copied(kinds["a shard of Vicuna"], tmp_path)
    first, size = max(members(file, "/data/"), key=lambda row: row[1])
    flip(file, first + size // 2, 128)
    whole = model.merge([open_source(kinds["OpenAI's CLIP"][0]), open_source(vicuna)])
    with pytest.raises(ValueError, match="00002-of-00003.bin is damaged: the CRC-32"):
        export.export(whole, tmp_path / "out", "llava_fn")
    assert [path.name for path in tmp_path.iterdir()] == ["vicuna"]


@pytest.mark.parametrize("all_", [True, False])
def test_an_archive_without_sums_is_told_from_a_damaged_one(all_, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    if all_:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"w": torch.ones(3)}, path)
        finally:
            torch.serialization.set_crc32_options(True)
        said = r"was saved without sums \(torch.serialization.set_crc32_options\(False\)\), so that damage to it cannot"
    else:
        at = data.index(b"PK\x01\x02")
        data[at + 16 : at + 20] = bytes(4)  # one member's sum in the list at the end
        path.write_bytes(data)
        said = "is truncated or damaged|is damaged"
    with pytest.raises(ValueError, match=said):
        open_archive(path)


@pytest.mark.parametrize("kind", [*KINDS, "llava-hf"])
def test_a_truncated_file_is_named(kind, kinds, tmp_path):
    source, file = copied(kinds[kind], tmp_path)
    data = file.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 9):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"{file.name} \({size} bytes\) is "):
            open_source(source)


SUMS = {
    "{name}.sha256": "{sum}", "SHA256SUMS": "{other}  other.bin\n{sum}  {name}\n",
    "sha256sums.txt": "{sum} *./{name}\r\n",
    "{name}.sha256 ": "SHA256 ({name}) = {SUM}\n",
}  # fmt: skip


@pytest.mark.parametrize("where", SUMS)
@pytest.mark.parametrize("kind", ["mm_projector.bin", "llava-hf"])
def test_a_file_is_held_to_the_sum_beside_it(where, kind, kinds, tmp_path):
    source, file = copied(kinds[kind], tmp_path)
    sum_ = hashlib.sha256(file.read_bytes()).hexdigest()
    place = file.with_name(where.strip().format(name=file.name))

    def state(value):
        place.write_text(SUMS[where].format(sum=value, SUM=value.upper(), name=file.name, other="0" * 64))

    state(sum_)
    open_source(source)
    state("a" * 64)
    with pytest.raises(
        ValueError, match=f"{file.name} is damaged: its SHA-256 is {sum_}, not the {'a' * 64} of .*{place.name}"
    ):
        open_source(source)
    place.write_text("not found\n")
    with pytest.raises(ValueError, match=f"{place.name}, line 1: 'not found' is no SHA-256 of a file"):
        open_source(source)


def test_a_flipped_bit_in_safetensors_is_seen_by_the_sum_beside_it(kinds, tmp_path):
    source, file = copied(kinds["llava-hf"], tmp_path)
    (source / "SHA256SUMS").write_text(f"{digest(file)}  {file.name}\n")
    flip(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its SHA-256 is"):
        open_source(source)


def test_a_file_of_the_hub_s_cache_is_held_to_its_name_on_request(kinds, tokenizer, tmp_path):
    projector, hf = kinds["mm_projector.bin"][0], kinds["llava-hf"][0]
    snapshot = tmp_path / "models--x--y/snapshots/0af"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x--y/blobs").mkdir()
    for path in hf.iterdir():
        blob = tmp_path / "models--x--y/blobs" / digest(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    convert.read(convert.Convert((snapshot, tmp_path / "out"), check_cache=True))
    flip(blob := (snapshot / "model.safetensors").resolve(), blob.stat().st_size // 2)
    convert.read(convert.Convert((snapshot, tmp_path / "out")))
    with pytest.raises(
        ValueError, match=rf"model.safetensors is damaged: its SHA-256 is .* of the name of .*{blob.name}"
    ):
        convert.read(convert.Convert((snapshot, tmp_path / "out"), check_cache=True))
    assert sums.of_cache(projector) == {}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:3035c92b\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_named_as_what_it_is(name, kinds, tmp_path):
    source, _ = copied(kinds["llava-hf"], tmp_path)
    (source / name).write_text(POINTER)
    with pytest.raises(
        ValueError, match=rf"{name}.* is a Git LFS pointer, which stands in place of the file; download"
    ):
        open_source(source)


def test_a_folder_of_another_program_with_a_list_of_sums_is_not_taken_for_ours(kinds, tmp_path):
    source, file = copied(kinds["llava-hf"], tmp_path)
    (source / "SHA256SUMS").write_text(f"{digest(file)}  {file.name}\n")
    assert open_source(source).layout == "Hugging Face or liuhaotian"
    assert json.loads((source / "config.json").read_text())["model_type"] == "llava"
