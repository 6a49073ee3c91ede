"""The image tower against OpenAI's own CLIP, whose model.py is loaded by its path."""

import importlib.util
from pathlib import Path

import torch

from llava_fn import config, convert, spec, tree, vit


def load_model_file():
    folder = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
    module = importlib.util.spec_from_file_location("clip_model", folder / "model.py")
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    return loaded


def as_hf(state: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """OpenAI's names -> those of HF's image tower."""
    top = {"conv1.weight": "patch", "class_embedding": "cls", "positional_embedding": "positions"}
    out = {convert.VIT[path]: state[f"visual.{name}"] for name, path in top.items()}
    out |= {f"pre_layrnorm.{kind}": state[f"visual.ln_pre.{kind}"] for kind in ("weight", "bias")}
    parts = {"layer_norm1": "ln_1", "self_attn.out_proj": "attn.out_proj", "layer_norm2": "ln_2",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for i in range(blocks):
        theirs, ours = f"visual.transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            out |= {f"{ours}.{a}.{kind}": state[f"{theirs}.{b}.{kind}"] for a, b in parts.items()}
            rows = state[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            out |= {f"{ours}.self_attn.{n}_proj.{kind}": r for n, r in zip("qkv", rows, strict=True)}
    return out


def test_vit_equals_openai_clip():
    c = config.Vision(image=28, patch=7, width=128, blocks=4, heads=2, ffn=512)
    theirs = load_model_file().CLIP(16, c.image, c.blocks, c.width, c.patch, 8, 50, 32, 2, 1).float().eval()
    rng = torch.Generator().manual_seed(0)
    for p in theirs.visual.parameters():  # norms and biases leave 1 and 0
        p.data = torch.randn(p.shape, generator=rng) * 0.2 + (p.data if p.ndim == 1 else 0)
    params = convert.read(as_hf(theirs.state_dict(), c.blocks), convert.vit_names(c.used), vit.spec(c))
    pixels, hidden = torch.randn(2, 3, 28, 28, generator=rng), []
    theirs.visual.transformer.resblocks[c.used - 1].register_forward_hook(lambda *args: hidden.append(args[2]))
    with torch.no_grad():
        theirs.encode_image(pixels)
        mine = vit.encode(params, pixels, c)
    want = hidden[0].permute(1, 0, 2)[:, 1:]  # theirs is tokens first
    assert (mine - want).abs().max() <= 1e-5 * want.abs().max()


def test_every_leaf_of_the_spec_has_one_name():
    c = config.Vision(image=28, patch=7, width=8, blocks=12, heads=2, ffn=8)
    names = convert.vit_names(c.used)
    assert {"/".join(path) for path, _ in spec.leaves(vit.spec(c))} == set(names)
    assert len(set(names.values())) == len(names)
    assert tree.paths(spec.init(vit.spec(c), 0)) == [path for path, _ in spec.leaves(vit.spec(c))]
