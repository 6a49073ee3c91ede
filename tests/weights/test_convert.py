"""The recipe that converts weights, as a person runs it; what it leaves when it is stopped, and what it says."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import layouts
import pytest
import torch
from layouts import C
from mindspeed_files import mindspeed_json
from safetensors.torch import load_file
from warm import ENV, ROOT
from warm import recipe as module

from llava_fn import config, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.launch import cli
from llava_fn.weights import configs, export, model
from llava_fn.weights.source import open_source

pretrain = module("pretrain")
convert = module("convert")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def recipe(warm):
    """Runs the recipe with these words."""
    return lambda *args: warm.run(["python", ROOT / "recipes/convert.py", *args], ROOT, ENV)


@pytest.fixture(scope="module")
def state():
    return layouts.hub(layouts.hf_model())


@pytest.fixture(scope="module")
def seed(state, tokenizer, tmp_path_factory):
    """The files that MindSpeed-MM's guide names."""
    root = tmp_path_factory.mktemp("seed")
    layouts.write_openai(root / "ViT-L-14-336px.pt", state)
    layouts.write_vicuna(root / "vicuna-7b-v1.5", state, "bin", tokenizer.model)
    layouts.write_projector(root / "mm_projector.bin", state)
    return root


def test_the_files_of_the_guide_become_a_model_and_go_out_to_transformers(recipe, seed, state, tmp_path):
    files = [seed / name for name in ("ViT-L-14-336px.pt", "vicuna-7b-v1.5", "mm_projector.bin")]
    done = recipe(*files, tmp_path / "weights/model")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 blocks of CLIP, projector, 2 blocks of Llama, 512 pieces" in done.stdout
    assert f"{files[0]} is NOT the file that OpenAI published" in done.stderr
    loaded = checkpoint.load_model(tmp_path / "weights/model")
    want = model.from_state_dict(layouts.text_rows(state), C)
    assert loaded.manifest.model == C
    for path in tree.paths(want):
        assert torch.equal(loaded.params[path].float(), want[path].float())
    done = recipe("--to", "llava-hf", tmp_path / "weights/model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    theirs = layouts.HFLlava.from_pretrained(tmp_path / "out").state_dict()
    row = "model.language_model.layers.1.mlp.down_proj.weight"
    assert torch.equal(theirs[row], state["language_model.model.layers.1.mlp.down_proj.weight"])


def test_the_published_file_is_not_complained_of(seed, monkeypatch, capsys):
    path = seed / "ViT-L-14-336px.pt"
    monkeypatch.setitem(convert.OPENAI, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    convert.check_published(path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("trained", [False, True], ids=["converted", "save_dir"])
def test_users_of_mindspeed_mm_move_in_one_command(recipe, trained, state, tokenizer, emojis, tmp_path):
    weights = layouts.write_mindspeed(tmp_path / "ms", state, C.vision.blocks, tokenizer.model)
    sources = mindspeed_json(tmp_path, weights, emojis)
    if trained:
        sources.append(layouts.write_megatron(tmp_path / "save_dir", state))
    done = recipe(*sources, tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    assert "no meaning here: " in done.stderr and "persist_layer_norm" in done.stderr
    assert ("converted_clip.pt is left out: vision comes from another source" in done.stderr) == trained
    loaded = checkpoint.load_model(tmp_path / "moved")
    want = model.from_state_dict(layouts.text_rows(state), C)
    assert (loaded.manifest.model, loaded.manifest.image_mode) == (C, "pad")
    for path in tree.paths(want):
        assert torch.equal(loaded.params[path], want[path])
    how = cli.read(pretrain.Pretrain, tmp_path / "moved-pretrain.json")
    assert (how.base, how.train, how.data.image_mode) == (tmp_path / "moved", "projector", "pad")
    assert how.data.sources[0].records == emojis / "train.json"


def test_what_a_person_can_set_right_is_one_line(recipe, seed, tmp_path):
    (tmp_path / "there").mkdir()
    words = {"tokenizer": seed / "vicuna-7b-v1.5/tokenizer.model"}
    projector, out = seed / "mm_projector.bin", tmp_path / "out"
    cases = {
        "exists; name another place": ((projector, tmp_path / "there"), {}),
        "no such file or folder": ((seed / "nothing", out), {}),
        "does not bring the vision and the llama; name a source": ((projector, out), words),
        "has no tokenizer.model; give one": ((projector, out), {}),
        "give at least one source": ((projector,), {}),
    }
    for said, (paths, options) in cases.items():
        with pytest.raises(ValueError, match=said):
            convert.main(convert.Convert(paths, **options))
    done = recipe(seed / "nothing", out)
    assert done.returncode == 1 and done.stderr == f"error: {seed / 'nothing'}: no such file or folder\n"
    assert not out.exists()


@pytest.mark.parametrize("to", ["llava_fn", "llava-hf", "liuhaotian", "mm_projector"])
def test_every_layout_is_written_in_the_dtype_that_is_named(to, seed, state, tmp_path):
    sources, out = [seed / name for name in ("ViT-L-14-336px.pt", "vicuna-7b-v1.5", "mm_projector.bin")], tmp_path / to
    convert.main(convert.Convert((*sources, out), to=to, dtype="bfloat16"))
    source = open_source(out)
    want = model.from_state_dict(layouts.text_rows(state), C)
    assert {leaf.read().dtype for of in (source.leaves, source.spare) for leaf in of.values()} == {torch.bfloat16}
    assert ("vision/blocks/3/wq" in source.spare) == (to != "mm_projector")  # CLIP's last block, which goes out again
    for path, leaf in source.leaves.items():
        assert torch.equal(leaf.read(), want[tuple(path.split("/"))].bfloat16()), path
    if to not in ("llava_fn", "mm_projector"):
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_into_another_dtype_in_one_rounding(dtype, seed, state, tmp_path):
    adapter, rounded = layouts.write_lora(tmp_path / "lora", state, 4, 8)
    exact = layouts.write_lora(tmp_path / "exact", {name: t.float() for name, t in state.items()}, 4, 8)[1]
    sources = [seed / name for name in ("ViT-L-14-336px.pt", "vicuna-7b-v1.5")]
    convert.main(convert.Convert((*sources, adapter, tmp_path / "out"), dtype=dtype, merge_lora=True))
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    want, twice = (x[name].to(getattr(torch, dtype)) for x in (exact, rounded))
    got = open_source(tmp_path / "out").leaves["llama/blocks/1/w_up"].read()
    assert torch.equal(got, want) and not torch.equal(got, twice)


def test_adapters_go_out_alone(recipe, seed, state, tmp_path):
    adapter, _ = layouts.write_lora(tmp_path / "lora", state, 4, 8)
    done = recipe(*[seed / name for name in ("ViT-L-14-336px.pt", "vicuna-7b-v1.5")], adapter, tmp_path / "out",
                  "--to", "peft", "--dtype", "float16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}: adapters of 14 weights, projector\n"
    a, b = (open_source(folder) for folder in (adapter, tmp_path / "out"))
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {torch.float16}
    for path, (x, y, scale) in a.lora.items():
        assert torch.equal(x.read().half(), b.lora[path][0].read()) and torch.equal(
            y.read().half(), b.lora[path][1].read()
        )
        assert scale == b.lora[path][2]
    assert torch.equal(a.leaves["projector/w1"].read().half(), b.leaves["projector/w1"].read())


KILLED = """
import os, sys
from pathlib import Path
from llava_fn.weights import export, model
from llava_fn.weights.source import open_source
left = [40]
def wrote(size):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
export.export(model.merge([open_source(Path(a)) for a in sys.argv[2:]]), Path(sys.argv[1]), "llava_fn", wrote)
"""


def test_a_killed_conversion_leaves_nothing_under_its_name(seed, tmp_path):
    sources = [seed / name for name in ("ViT-L-14-336px.pt", "vicuna-7b-v1.5")]
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out", *sources], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".part-out"]
    source = model.merge([open_source(path) for path in sources])
    export.export(source, tmp_path / "out", "llava_fn")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing_at_all(seed, tmp_path):
    source = model.merge([open_source(seed / name) for name in ("ViT-L-14-336px.pt", "vicuna-7b-v1.5")])

    def stop(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export(source, tmp_path / "out", "llava_fn", stop)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.factor=2.0; this Llama scales its rotary"),
        ({"attention_bias": True}, "attention_bias=true; only false is supported"),
        ({"head_dim": 64}, "head_dim=64; only hidden_size / num_attention_heads = 128 works here"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta=10000.0, .*=500000.0 disagree"),
    ],
)
def test_llamas_that_compute_something_else_are_refused(change, said):
    with pytest.raises(ValueError, match=f"some/config.json: .*{said}"):
        configs.stated("some/config.json", change)


def test_published_configs_give_the_7b_model():
    values = json.loads('{"hidden_size": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32000, "rope_scaling": null}')
    assert configs.stated("config.json", values).llama == config.LLAVA_7B.llama
    clip = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14}  # fmt: skip
    assert configs.stated("config.json", clip).vision == config.LLAVA_7B.vision
