"""HF folders, written by transformers, become a base with the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_fn import checkpoint, config, convert, emoji, llama, vit
from llava_fn.batch import Stream

ROOT = Path(__file__).parents[1]
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def write_clip(folder: Path, whole: bool, **how) -> CLIPVisionModel:
    vision = CLIPVisionConfig(**VISION)
    if not whole:
        model = CLIPVisionModel(vision)
        model.save_pretrained(folder, **how)
        return model.eval()
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    model = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=4))
    model.save_pretrained(folder, **how)
    return model.eval().vision_model


def write_llama(folder: Path, tmp: Path, tied: bool = False, **how) -> LlamaForCausalLM:
    c = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
                    num_key_value_heads=2, rms_norm_eps=1e-3, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(c)
    model.save_pretrained(folder, **how)
    data = emoji.unpack(tmp / "emoji-data")
    (folder / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    return model.eval()


def as_bin(folder: Path) -> None:
    """The older layout: pickled shards."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model-00001-of-00001.bin")
    path.unlink()


def recipe(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "recipes/convert.py", *args]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True)


@pytest.mark.parametrize("whole, tied, old", [(True, False, False), (False, True, True)])
def test_converted_base_equals_both_sources(tmp_path, whole, tied, old):
    clip, vicuna, out = tmp_path / "clip", tmp_path / "vicuna", tmp_path / "weights/base"
    tower, decoder = write_clip(clip, whole), write_llama(vicuna, tmp_path, tied)
    if old:
        as_bin(clip)
        as_bin(vicuna)
    done = recipe("--clip", clip, "--llama", vicuna, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 blocks of CLIP" in done.stdout
    base = checkpoint.load(out)
    model, p = base.manifest.model, base.params
    assert model.llama == config.Llama(512, 16, 2, 4, 2, 24, 1e-3, 10000.0, tied)
    pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(3, 512, (7,))
    with torch.no_grad():
        want = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(vit.encode(p["vision"], pixels, model.vision), want)
        hidden = llama.decode(p["llama"], p["llama"]["embed"][ids], Stream.of([7]), model.llama)
        torch.testing.assert_close(llama.logits(p["llama"], hidden, model.llama), decoder(ids[None]).logits[0])


def test_tensors_without_a_place_and_missing_ones_are_named(tmp_path):
    write_llama(tmp_path / "vicuna", tmp_path)
    path = tmp_path / "vicuna/model.safetensors"
    state = load_file(path)
    save_file(state | {"model.layers.0.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 tensors that have no place in this model: model.layers.0.extra"):
        convert.read_llama(tmp_path / "vicuna")
    del state["model.norm.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match="vicuna: 1 tensors are missing: model.norm.weight"):
        convert.read_llama(tmp_path / "vicuna")
    save_file(state | {"model.norm.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"model.norm.weight is \(3,\), the config wants \(16,\)"):
        convert.read_llama(tmp_path / "vicuna")


def test_missing_shard_and_missing_weights_are_named(tmp_path):
    write_llama(tmp_path / "vicuna", tmp_path, max_shard_size="20KB")
    sorted((tmp_path / "vicuna").glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match="names files that are missing: model-00001-of"):
        convert.read_llama(tmp_path / "vicuna")
    for path in (tmp_path / "vicuna").glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no .*safetensors and no pytorch_model"):
        convert.tensors(tmp_path / "vicuna")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales its rotary embedding"),
        ({"attention_bias": True}, "has biases"),
        ({"head_dim": 64}, "heads are 64 wide, not width / heads = 128"),
    ],
)
def test_llamas_that_compute_something_else_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        convert.llama_config(change)


def test_pickled_code_is_never_run(tmp_path):
    write_llama(tmp_path / "vicuna", tmp_path)
    (tmp_path / "vicuna/model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.norm.weight": Trap()}, tmp_path / "vicuna/pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged, or holds more than tensors"):
        convert.read_llama(tmp_path / "vicuna")
    assert not (tmp_path / "ran").exists()


def test_truncated_file_is_named(tmp_path):
    write_llama(tmp_path / "vicuna", tmp_path)
    path = tmp_path / "vicuna/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        convert.read_llama(tmp_path / "vicuna")


def test_published_vicuna_config_gives_the_7b_model():
    values = json.loads('{"hidden_size": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32000, "rope_scaling": null}')
    assert convert.llama_config(values) == config.LLAVA_7B.llama
    clip = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14}  # fmt: skip
    assert convert.vision_config(clip) == config.LLAVA_7B.vision
