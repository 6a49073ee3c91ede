"""The image tower against OpenAI's own CLIP, whose model.py is loaded by its path."""

import importlib.util
from pathlib import Path

import torch

from llava_fn import config, vit
from llava_fn.weights.model import from_state_dict


def load_model_file():
    folder = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
    module = importlib.util.spec_from_file_location("clip_model", folder / "model.py")
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    return loaded


def test_vit_equals_openai_clip():
    c = config.Vision(image=28, patch=7, width=128, blocks=4, heads=2, ffn=512)
    theirs = load_model_file().CLIP(16, c.image, c.blocks, c.width, c.patch, 8, 50, 32, 2, 1).float().eval()
    rng = torch.Generator().manual_seed(0)
    for p in theirs.visual.parameters():  # norms and biases leave 1 and 0
        p.data = torch.randn(p.shape, generator=rng) * 0.2 + (p.data if p.ndim == 1 else 0)
    params = from_state_dict(theirs.state_dict(), config.Llava(vision=c))["vision"]
    pixels, hidden = torch.randn(2, 3, 28, 28, generator=rng), []
    theirs.visual.transformer.resblocks[c.used - 1].register_forward_hook(lambda *args: hidden.append(args[2]))
    with torch.no_grad():
        theirs.encode_image(pixels)
        mine = vit.encode(params, pixels, c)
    want = hidden[0].permute(1, 0, 2)[:, 1:]  # theirs is tokens first
    assert (mine - want).abs().max() <= 1e-5 * want.abs().max()
