"""What the campaign spoils: for each kind a small valid input, how it is read, and whether a sum guards it."""

import base64
import functools
import hashlib
import importlib.util
import io
import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_fn import config, llava, lora, spec, tree
from llava_fn.checkpoint import boxes, shares
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.data import image, records
from llava_fn.data.options import Source
from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.evaluate import golds, prompts, tsv
from llava_fn.generate import assistant, conversation
from llava_fn.generate.options import PRESETS, Decoding
from llava_fn.launch import cli
from llava_fn.weights import export, model
from llava_fn.weights.source import Weights, open_source

TINY = config.Llava(
    config.Vision(image=16, patch=8, width=16, blocks=2, heads=2, ffn=32),
    config.Llama(vocab=512, width=16, blocks=2, heads=2, kv_heads=1, ffn=32),
)
PARTS = ("vision", "projector", "llama")
RANK = 2  # of the adapters
TO = assistant.Placement(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Subject:
    """One kind of input.

    make: writes the files into an empty folder. files: those that are spoiled, one at a time. read: what the folder
    holds; equal values have equal digests. use: what a reader's value is for; it is called where the value differs.
    free: why another value may be right; empty where a sum of the format says otherwise. seal: writes these sums anew.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    free: str = ""
    use: Callable[[object], object] = lambda value: None
    seal: Callable[[Path], None] | None = None


def digest(value: object) -> str:
    """SHA-256 of a value: equal for equal bits."""
    out = hashlib.sha256()
    _feed(out, value)
    return out.hexdigest()


def _feed(out, value: object) -> None:
    if isinstance(value, Tensor):
        out.update(f"{value.dtype}{tuple(value.shape)}".encode())
        out.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Leaf):
        _feed(out, value.read())
    elif is_dataclass(value):
        _feed(out, {f.name: getattr(value, f.name) for f in fields(value)})
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            out.update(repr(key).encode())
            _feed(out, value[key])
    elif isinstance(value, list | tuple):
        for item in (len(value), *value):
            _feed(out, item)
    else:
        out.update(repr(value).encode())


# ---- weights


@functools.cache
def words() -> bytes:
    """A small tokenizer.model."""
    content = resources.files("llava_fn.data").joinpath("emoji.zip").read_bytes()
    return zipfile.ZipFile(io.BytesIO(content)).read("tokenizer.model")


@functools.cache
def _params(seed: int = 0, adapted: bool = False):
    own = spec.init(lora.extended(llava.spec(TINY), config.Lora(RANK) if adapted else None), 0)
    rng = torch.Generator().manual_seed(seed)
    return tree.rebuild(own, [torch.randn(x.shape, generator=rng) * 0.7 for x in tree.values(own)])


def manifest(**more) -> checkpoint.Manifest:
    return replace(checkpoint.Manifest(TINY, PARTS, "pad", "vicuna_v1", None, step=7, recipe={"lr": 1.0}), **more)


def save_checkpoint(folder: Path) -> None:
    """Of a tiny model, with its moments, as `folder`/000007."""
    moments = (_params(1), _params(2))
    checkpoint.save(folder / "000007", manifest(), _params(), moments, words())


def _sharded(folder: Path) -> None:
    """By two ranks: each has half of the rows of each tensor."""
    for rank in (0, 1):
        pieces = []
        for params in map(_params, range(3)):
            own = []
            for path, p in spec.leaves(llava.spec(TINY)):
                half = -(-p.shape[0] // 2)
                rows = (0, half) if rank == 0 else (half, p.shape[0])
                box = (rows, *((0, n) for n in p.shape[1:]))
                own.append(boxes.Piece(path, p.shape, box, params[path][slice(*rows)].contiguous()))
            pieces.append(own)
        shares.write_share(folder / "000007", rank, pieces[0], (pieces[1], pieces[2]))
    shares.commit(folder / "000007", 2, manifest(), words(), 1.0)


def _seal(folder: Path) -> None:
    at = folder / "000007"
    (at / checkpoint.SUMS).write_text(checkpoint.sums(at))


def _exported(folder: Path, layout: str) -> Path:
    save_checkpoint(folder.parent / "ours")
    export.export(open_source(folder.parent / "ours/000007"), folder / "w", layout)
    return folder / "w"


def _split(folder: Path, kind: str) -> None:
    """Two shards and their index in place of model.safetensors. kind: safetensors or bin."""
    whole = folder / "model.safetensors"
    tensors, stem, where = load_file(whole), {"bin": "pytorch_model"}.get(kind, "model"), {}
    for j in (0, 1):
        name, part = f"{stem}-{j + 1:05d}-of-00002.{kind}", dict(sorted(tensors.items())[j::2])
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    whole.unlink()


def _hf(folder: Path) -> None:
    _split(_exported(folder, "llava-hf"), "safetensors")


def _liuhaotian(folder: Path) -> None:
    _split(_exported(folder, "liuhaotian"), "bin")


def _projector(folder: Path, legacy: bool) -> None:
    path = _exported(folder, "mm_projector")
    torch.save(torch.load(path), folder / "mm_projector.bin", _use_new_zipfile_serialization=not legacy)
    path.unlink()


def _adapters(folder: Path) -> None:
    """Adapters that a run of ours trained, as PEFT's folder, and its base."""
    save_checkpoint(folder / "base")
    own = manifest(parts=("lora",), lora=config.Lora(RANK), base=checkpoint.Base(
        str(folder / "base/000007"), checkpoint.fingerprint(folder / "base/000007")))  # fmt: skip
    params = tree.split(_params(adapted=True), lambda path: path[0] == "lora")[0]
    checkpoint.save(folder / "run", own, params, None, words())
    export.export(open_source(folder / "run"), folder / "w", "peft")


def _clip(folder: Path) -> None:
    """A TorchScript archive like OpenAI's: their model with random weights, half of them in half precision."""
    place = Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / "model.py"
    found = importlib.util.spec_from_file_location("clip_model", place)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    torch.manual_seed(0)
    clip = module.CLIP(16, 16, 2, 64, 8, 8, 50, 32, 2, 1).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(clip, {"encode_image": (torch.zeros(1, 3, 16, 16),)})
        for name, p in traced.named_parameters():
            if "ln_" not in name and "embedding" not in name:
                p.data = p.data.half()
        torch.jit.save(traced, folder / "ViT.pt")


def _weights(*paths: str) -> Callable[[Path], object]:
    """A whole model's."""
    return lambda folder: assistant.open_weights([folder / path for path in paths])


def _part(path: str) -> Callable[[Path], object]:
    """A part of a model's."""
    return lambda folder: model.merge([open_source(folder / path)])


def digestible(value: object) -> object:
    """A value without what is not its content: the place and the mapped files of weights."""
    return replace(value, where="", layout="", archives=()) if isinstance(value, Weights) else value


def _answer(weights: object) -> None:
    """Three tokens about a picture. ValueError if weights that are numbers give what is no number."""
    assert isinstance(weights, Weights)
    a = assistant.place(weights, assistant.form_of(weights), TO, context=128)
    chat = conversation.ask(conversation.Chat(), "What?", [conversation.picture(Image.new("RGB", (20, 16)), a)])
    ((answer,),) = conversation.answers(a, [chat], Decoding(tokens=3, logprobs=True))
    finite = all(x.isfinite().all() and x.abs().max() < 1e6 for x in tree.values(a.model.params))
    if finite and not torch.tensor(answer.logprobs).isfinite().all():
        raise ArithmeticError(f"weights that are numbers answer with log-probabilities of {answer.logprobs}")


# ---- records and images


def _picture(kind: str = "PNG", seed: int = 0, **how) -> bytes:
    out, rng = io.BytesIO(), torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (18, 24, 3), generator=rng, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(out, kind, **how)
    return out.getvalue()


def _turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[j % 2], "value": text} for j, text in enumerate(texts)]


CAPTIONS = [
    {"id": f"{j:09d}", "image": f"images/{j}.png", "conversations": _turns("<image>\nWhat is this?", caption)}
    for j, caption in enumerate(("woman juggling: dark skin tone", "a caf\u00e9", "\U0001f600 a face", "man"))
]
CHATS = [
    {"id": 0, "image": "images/0.png", "conversations": _turns("<image>\nWho?", "a woman", "Her role?", "juggler")},
    {"id": 1, "conversations": _turns("Say a word.", "word")},
    {"id": "two", "image": ["images/0.png", "images/1.png"],
     "conversations": _turns("Is\n<image>\nlike\n<image>\n?", "no")},
]  # fmt: skip


def _records(folder: Path, rows: list[dict], name: str) -> None:
    (folder / "images").mkdir()
    for j in range(4):
        (folder / f"images/{j}.png").write_bytes(_picture(seed=j))
    lines = name.endswith(".jsonl")
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    (folder / name).write_text(text)


def _image(folder: Path, name: str, **how) -> None:
    (folder / "images").mkdir()
    (folder / name).write_bytes(_picture(**how))
    (folder / "one.json").write_text(json.dumps([CAPTIONS[0] | {"image": name}]))


def _samples(name: str, template: str, mode: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        p = records.Preparation(open_tokenizer(words()), template, None, mode, 16, 4, 256)
        return [records.sample(r, p) for r in records.read(Source(folder / name, folder))]

    return read


# ---- benchmarks


def _table(folder: Path, name: str) -> None:
    pictures = [base64.b64encode(_picture(seed=j)).decode() for j in range(3)]
    rows = {
        "AI2D_TEST": ["index\tquestion\tA\tB\tC\tanswer\tcategory\timage",
                      f'0\t"What is ""A""?"\ta star\tNone\t007\tA\tatoms\t{pictures[0]}',
                      "1\tWhich?\t14\t0.5\t\tB\tatoms\t0", f"2\tWho?\t=1+1\tx\ty\tC\twebs\t{pictures[1]}"],
        "ChartQA_TEST": ["index\tquestion\tanswer\tsplit\timage", f"0\tHow many?\t[2011, 2015]\thuman\t{pictures[0]}",
                         f"1\tHow much?\t45%\thuman\t{pictures[1]}"],
        "DocVQA_VAL": ["index\tquestion\tanswer\timage", f"""0\tName?\t["ITC", 'O"N']\t{pictures[0]}""",
                       f"1\tDate?\t['1/2/98']\t{pictures[1]}"],
        "MMMU_DEV_VAL": ["index\tid\tquestion\tA\tB\tanswer\tl2-category\tcategory\timage_path\timage",
                         f"1\tdev_Music_1\tWhich, <image 1> or <image 2>?\tx\ty\tB\tMusic\tArt\t['a.png', 'b.png']\t"
                         f"['{pictures[0]}', '{pictures[1]}']",
                         f"2\tdev_Art_2\tHow?\t\t\t8\tArt\tArt\tc\t{pictures[2]}"],
        "paths": ["index\tquestion\tanswer\timage_path", "a\tWhat?\tx\t0.png", "b\tBoth?\ty\t['0.png', '1.png']"],
    }[name]  # fmt: skip
    (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for j in range(2):
        (folder / f"{j}.png").write_bytes(_picture(seed=j))


def _questions(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        path = folder / f"{name}.tsv"
        table, style = tsv.open_table(path), prompts.style("vlmevalkit", PRESETS["original"])
        out = []
        for q in table.questions:
            content = table.images(q)
            parts = prompts.parts(style, prompts.question_text(q, table.dataset.kind), len(content))
            pixels = [image.to_pixels(image.open_image(x, f"{path}, index {q.index}"), 16, "pad") for x in content]
            out.append((q, parts, pixels, golds.golds(q.cells["answer"])))
        return out

    return read


# ---- configs of runs


@functools.cache
def _preset() -> object:
    place = Path(__file__).parents[2] / "recipes/pretrain.py"
    found = importlib.util.spec_from_file_location("campaign_pretrain", place)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where its dataclasses look for their types
    found.loader.exec_module(module)
    return module.EMOJI


def _run(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config.plain(_preset()), indent=1))


def _read_run(folder: Path) -> object:
    return cli.read(type(_preset()), folder / "config.json")


# ---- the table

PLAIN = "numbers and texts in JSON have no sum: another legal value is another model, record or run"
NONE = "the format has no sum: other bits are other numbers"
SAID = "the sums were written anew, so the folder says that it is so"
CLAIM = "a name or a size in the archive was changed with its sums, so the archive says that it is so"
TSVS = ("AI2D_TEST", "ChartQA_TEST", "DocVQA_VAL", "MMMU_DEV_VAL", "paths")
HF = ("w/config.json", "w/preprocessor_config.json", "w/processor_config.json", "w/tokenizer_config.json")
FORMATS = {  # name -> how Pillow writes it, whether a sum of the format guards the pixels
    "png": ({"kind": "PNG"}, True), "jpg": ({"kind": "JPEG"}, False), "gif": ({"kind": "GIF"}, False),
    "webp": ({"kind": "WEBP", "lossless": True}, False), "bmp": ({"kind": "BMP"}, False),
    "tif": ({"kind": "TIFF", "compression": "tiff_lzw"}, False),
}  # fmt: skip


def _load(folder: Path) -> object:
    own = checkpoint.load(folder / "000007", moments=True)
    return {"manifest": own.manifest, "tokenizer": own.tokenizer} | {
        kind: dict(zip(map("/".join, tree.paths(t)), tree.values(t), strict=True))
        for kind, t in (("params", own.params), *zip(("first", "second"), own.moments, strict=True))
    }


def subjects() -> list[Subject]:
    """All kinds."""
    ours = ("000007/manifest.json", "000007/tokenizer.model", "000007/SHA256SUMS")
    one = (*ours, "000007/params.safetensors", "000007/optim.safetensors")
    two = (*ours, "000007/boxes.json", "000007/params-00000.safetensors", "000007/optim-00001.safetensors")
    shards = ("w/model-00001-of-00002.safetensors", "w/model.safetensors.index.json")
    bins = ("w/pytorch_model-00001-of-00002.bin", "w/pytorch_model.bin.index.json")
    peft = ("w/adapter_config.json", "w/adapter_model.safetensors")
    whole, trained = _weights("w"), _weights("base/000007", "w")
    out = [
        Subject("safetensors", _hf, shards, whole, NONE, _answer),
        Subject("configs of a model", _hf, HF, whole, PLAIN, _answer),
        Subject("config.json of LLaVA's code", _liuhaotian, ("w/config.json",), whole, PLAIN, _answer),
        Subject("tokenizer.model", _hf, ("w/tokenizer.model",), whole, NONE, _answer),
        Subject("torch.save (.bin)", _liuhaotian, bins, whole, "", _answer),
        Subject("torch.save (.pt)", lambda f: _projector(f, False), ("mm_projector.bin",), _part("mm_projector.bin")),
        Subject("torch.save, legacy", lambda f: _projector(f, True), ("mm_projector.bin",),
                _part("mm_projector.bin"), NONE),
        Subject("TorchScript", _clip, ("ViT.pt",), _part("ViT.pt")),
        Subject("adapters (PEFT)", _adapters, peft, trained, f"{PLAIN}; {NONE}", _answer),
        Subject("checkpoint", save_checkpoint, one, _load, seal=_seal),
        Subject("checkpoint of two ranks", _sharded, two, _load, seal=_seal),
        Subject("config of a run", _run, ("config.json",), _read_run, PLAIN),
    ]  # fmt: skip
    for rows, template, mode, stage in ((CAPTIONS, "plain", "square", 1), (CHATS, "vicuna_v1", "pad", 2)):
        for name in ("train.json", "train.jsonl"):
            make, read = functools.partial(_records, rows=rows, name=name), _samples(name, template, mode)
            out.append(Subject(f"records of stage {stage}, {name[5:]}", make, (name,), read, PLAIN))
    for kind, (how, summed) in FORMATS.items():
        name = f"images/0.{kind}"
        make, read = functools.partial(_image, name=name, **how), _samples("one.json", "plain", "pad")
        out.append(Subject(f"image, {kind}", make, (name,), read, "" if summed else NONE))
    for name in TSVS:
        make = functools.partial(_table, name=name)
        out.append(Subject(f"benchmark, {name}", make, (f"{name}.tsv",), _questions(name), f"{NONE}; {PLAIN}"))
    return out
