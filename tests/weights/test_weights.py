"""Every public layout in, every layout out, bit for bit; and what does not fit is listed and refused."""

import copy
import dataclasses
import hashlib
import json
import shutil

import layouts
import pytest
import torch
from layouts import C
from memory import resident
from rounding import same_but_rounded
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers import LlavaForConditionalGeneration as HFLlava

from llava_fn import config, llava, spec, tree, vit
from llava_fn.batch import IMAGE, Sample
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint import leaf
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.generate.decode import greedy
from llava_fn.generate.types import Model
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.weights import export, model, placing
from llava_fn.weights.source import open_source
from llava_fn.weights.tables import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="session")
def peer():
    return layouts.hf_model()


@pytest.fixture(scope="session")
def state(peer):
    return layouts.hub(peer)


@pytest.fixture(scope="session")
def folders(state, tokenizer, tmp_path_factory):
    """Name of a layout -> the paths that hold the whole model in it. Read them, never write to them."""
    root, words = tmp_path_factory.mktemp("layouts"), tokenizer.model
    kinds = ("safetensors", "bin")
    vicuna = {kind: layouts.write_vicuna(root / f"vicuna-{kind}", state, kind, words) for kind in kinds}
    projector = layouts.write_projector(root / "mm_projector.bin", state)
    openai = layouts.write_openai(root / "ViT-L-14-336px.pt", state)
    towers = {whole: layouts.write_clip(root / f"clip-{whole}", state, whole) for whole in (True, False)}
    generations = {
        name: [layouts.write_llava_hf(root / f"hf-{name}", state, name, words)] for name in layouts.GENERATIONS
    }
    return generations | {
        "OpenAI CLIP, Vicuna, mm_projector.bin": [openai, vicuna["bin"], projector],
        "HF CLIPModel, Vicuna, mm_projector.bin": [towers[True], vicuna["safetensors"], projector],
        "HF CLIPVisionModel, Vicuna, mm_projector.bin": [towers[False], vicuna["safetensors"], projector],
        "liuhaotian with its tower": [layouts.write_liuhaotian(root / "liu", state, True, words)],
        "liuhaotian, CLIP": [openai, layouts.write_liuhaotian(root / "liu-bare", state, False, words)],
        "MindSpeed-MM": layouts.write_mindspeed(root / "ms", state, C.vision.blocks, words),
        "Megatron iteration": [layouts.write_megatron(root / "save_dir", state)],
    }


NAMES = [
    *layouts.GENERATIONS, "OpenAI CLIP, Vicuna, mm_projector.bin", "HF CLIPModel, Vicuna, mm_projector.bin",
    "HF CLIPVisionModel, Vicuna, mm_projector.bin", "liuhaotian with its tower", "liuhaotian, CLIP", "MindSpeed-MM",
    "Megatron iteration",
]  # fmt: skip


def opened(paths, tokenizer, merge_lora=False):
    source = model.merge([open_source(path) for path in paths])
    source = model.merge_lora(source) if merge_lora else source
    return source if source.tokenizer else dataclasses.replace(source, tokenizer=tokenizer.model)


def same(a, b, what: str) -> None:
    assert list(a) == list(b), what
    for path in a:
        x, y = a[path].read(), b[path].read()
        assert x.dtype == y.dtype and torch.equal(x, y), f"{what}: {path}"
        assert a[path].shape == tuple(x.shape) and a[path].dtype == x.dtype, f"{what}: {path}"


def ordered(leaves):
    return {path: leaves[path] for path in sorted(leaves)}


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_weights_of_transformers(name, folders, peer, tokenizer):
    source = opened(folders[name], tokenizer)
    want = model.from_state_dict(peer.state_dict(), dataclasses.replace(C, llama=config.Llama(**{
        **dataclasses.asdict(C.llama), "vocab": layouts.PADDED})))  # fmt: skip
    got = model.load(source)
    assert model.config(source) == C
    assert source.parts == ("vision", "projector", "llama")
    assert tree.paths(got) == [path for path, _ in spec.leaves(llava.spec(C))]
    for path in tree.paths(got):
        rows = want[path][: C.llama.vocab] if path[-1] in ("embed", "head") else want[path]
        assert torch.equal(got[path].float(), rows.float()), path


@pytest.mark.parametrize("to", export.LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_out_and_in_again_is_bit_identical(name, to, folders, tokenizer, tmp_path):
    source = opened(folders[name], tokenizer)
    export.export(source, tmp_path / "out", to)
    again = model.merge([open_source(tmp_path / "out")])
    parts = ("projector",) if to == "mm_projector" else source.parts
    assert again.parts == parts
    mine = {path: x for path, x in source.leaves.items() if path.split("/")[0] in parts}
    same(ordered(mine), ordered(again.leaves), f"{name} -> {to}")
    if to == "llava_fn":
        same(ordered(source.spare), ordered(again.spare), f"{name} -> {to}: spare")
    if to != "mm_projector":
        assert again.tokenizer == source.tokenizer
        assert again.llama == source.llama
        assert again.vision == source.vision
        assert again.image_mode == (source.image_mode or "square")


def test_a_written_file_is_aligned_and_its_digest_is_its_own(tmp_path):
    tensors = {"a": torch.randn(3).half(), "b": torch.randn(2, 2), "c": torch.zeros(0), "d": torch.randn(5).bfloat16()}
    sizes = []
    digest = leaf.write(tmp_path / "x", {name: Leaf.of(t) for name, t in tensors.items()}, (), sizes.append)
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert sorted(sizes) == [0, 6, 10, 16]
    got = load_file(tmp_path / "x")
    assert all(torch.equal(got[name], t) and got[name].dtype == t.dtype for name, t in tensors.items())
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    rows = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and all(rows[n]["data_offsets"][0] % t.itemsize == 0 for n, t in tensors.items())


def test_a_hub_model_goes_through_ours_and_comes_out_with_the_same_tensors(folders, state, tokenizer, tmp_path):
    source = opened(folders["hub"], tokenizer)
    export.export(source, tmp_path / "ours", "llava_fn")
    export.export(model.merge([open_source(tmp_path / "ours")]), tmp_path / "hf", "llava-hf")
    out = load_file(tmp_path / "hf/model.safetensors")
    assert out.keys() == state.keys()
    for name, t in state.items():
        assert torch.equal(out[name], t), name


@pytest.mark.parametrize("name", ["hub", "OpenAI CLIP, Vicuna, mm_projector.bin", "MindSpeed-MM"])
def test_transformers_loads_the_export_and_computes_the_same(name, folders, peer, tokenizer, tmp_path):
    source = opened(folders[name], tokenizer)
    export.export(source, tmp_path / "out", "llava-hf")
    theirs, said = HFLlava.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(said.values()), said
    reference = copy.deepcopy(peer).float()
    rng = torch.Generator().manual_seed(0)
    ids = [1, 5, *[C.llama.vocab] * C.vision.patches, 7, 8, 9]
    pixels = torch.randint(0, 256, (1, 3, C.vision.image, C.vision.image), generator=rng, dtype=torch.uint8)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": vit.normalise(pixels)}
    with torch.no_grad():
        want, got = reference(**inputs).logits, theirs(**inputs).logits
        same_but_rounded(got[..., : C.llama.vocab], want[..., : C.llama.vocab])
        said = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=list(range(512, 576)))
    mine = tree.cast(model.load(source), torch.float32)
    sample = Sample("x", tuple(IMAGE if i == C.llama.vocab else i for i in ids), tuple([False] * 8 + [True]), pixels)
    new = said[0, len(ids) :].tolist()
    assert greedy(Model(mine, C), [sample], 2, 12)[0] == (new[: new.index(2)] if 2 in new else new)
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.convert_tokens_to_ids("<image>") == C.llama.vocab


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_table_covers_each_leaf_of_the_spec_once(layout):
    c = dataclasses.replace(C, llama=dataclasses.replace(C.llama, blocks=12))
    for slot in layout.slots:
        ours = [path for rule in slot.rules(c) for path in rule.ours]
        shapes = placing.shapes(slot.part, c, (c.llama.width, c.vision.width))
        without_norm = {"post_g", "post_b"} if layout.name.startswith("MindSpeed") else set()
        assert sorted(ours) == sorted(shapes.keys() - (without_norm if slot.part == "vision" else set()))
        names = [rule.theirs for rule in slot.rules(c)]
        assert len(set(names)) == len(names)


def test_each_reshape_is_undone_by_its_inverse():
    for layout in LAYOUTS:
        for slot in layout.slots:
            shapes = placing.shapes(slot.part, C, (C.llama.width, C.vision.width))
            for rule in slot.rules(C):
                ours = [torch.randn(shapes[path]) for path in rule.ours]
                back = rule.reshape.split(rule.reshape.join(*ours))
                assert all(torch.equal(a, b) for a, b in zip(ours, back, strict=True)), rule.theirs


def test_a_tower_of_23_blocks_is_the_24_of_vit_l_without_the_last(state, tokenizer, tmp_path):
    """MindSpeed-MM's later converters leave it out; the hidden state that LLaVA reads is the same."""
    c = dataclasses.replace(C, vision=dataclasses.replace(C.vision, blocks=24))
    peer = layouts.hf_model(c)
    paths = layouts.write_mindspeed(tmp_path / "ms", layouts.hub(peer), 23, tokenizer.model, c)
    source = opened(paths, tokenizer)
    assert source.vision == c.vision and not source.spare
    whole = model.from_state_dict(layouts.hub(peer), model_of(c))
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        want = vit.encode(tree.cast(whole["vision"], torch.float32), pixels, c.vision)
        assert torch.equal(vit.encode(tree.cast(model.load(source)["vision"], torch.float32), pixels, c.vision), want)
    export.export(source, tmp_path / "hf", "llava-hf")
    again = model.merge([open_source(tmp_path / "hf")])
    assert (again.vision.blocks, again.vision.feature_layer, again.vision.used) == (23, -1, 23)
    assert again.spare["vision/post_g"].read().unique().tolist() == [1]  # the identity: there was none
    assert again.spare["vision/post_b"].read().unique().tolist() == [0]
    theirs, said = HFLlava.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(said.values()), said
    with torch.no_grad():
        hidden = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    got = hidden[theirs.config.vision_feature_layer]
    torch.testing.assert_close(got[:, 1:], want, rtol=0, atol=1e-4 * want.abs().max().item())


def model_of(c):
    return dataclasses.replace(c, llama=dataclasses.replace(c.llama, vocab=layouts.PADDED))


@pytest.mark.parametrize("stabilised", [False, True])
def test_adapters_are_merged_only_on_request(stabilised, folders, state, tokenizer, tmp_path):
    rank, alpha = 4, 8
    lora, merged = layouts.write_lora(tmp_path / "lora", state, rank, alpha)
    if stabilised:
        values = json.loads((lora / "adapter_config.json").read_text())
        values |= {"use_rslora": True, "lora_alpha": 4}  # 4 / sqrt(4) is 8 / 4
        (lora / "adapter_config.json").write_text(json.dumps(values))
    openai, vicuna, _ = folders["OpenAI CLIP, Vicuna, mm_projector.bin"]
    with pytest.raises(ValueError, match="lora holds LoRA adapters; give --merge-lora"):
        export.export(opened([openai, vicuna, lora], tokenizer), tmp_path / "out", "llava_fn")
    with pytest.raises(ValueError, match="lora do not fit the .*llama/blocks/0/wq is missing, not .256, 256.;"):
        opened([openai, lora], tokenizer, merge_lora=True)
    with pytest.raises(ValueError, match="--merge-lora is given, but .* holds no adapters"):
        opened([openai, vicuna], tokenizer, merge_lora=True)
    got = model.load(opened([openai, vicuna, lora], tokenizer, merge_lora=True))
    want = model.from_state_dict(layouts.text_rows(merged), C)
    plain = model.from_state_dict(layouts.text_rows(state), C)
    for path in tree.paths(got):
        assert torch.equal(got[path].float(), want[path].float()), path
    assert not torch.equal(got["llama", "blocks", "1", "w_up"], plain["llama", "blocks", "1", "w_up"])


CONFIGS = [  # fields of a config.json, and why they are refused
    (
        {"quantization_config": {"quant_method": "gptq"}},
        'quantization_config={"quant_method": "gptq"}; the weights are',
    ),
    ({"mm_vision_tower": "google/siglip-so400m"}, 'mm_vision_tower="google/siglip-so400m"; only a CLIP'),
    ({"s2": True}, "s2=true; only false or null is"),
    ({"mm_patch_merge_type": "spatial"}, 'mm_patch_merge_type="spatial"; only "flat" is'),
    ({"text_config.hidden_act": "gelu"}, 'text_config.hidden_act="gelu"; only "silu" is'),
    ({"text_config.hidden_size": "128"}, 'text_config.hidden_size="128"; it must be a whole number above 0'),
    ({"text_config.num_hidden_layers": None}, "text_config.num_hidden_layers=null; it must be a whole number above 0"),
    ({"text_config.rope_scaling": {"type": "linear"}}, 'text_config.rope_scaling.type="linear"; only "default"'),
    ({"vision_config.image_size": 29}, "vision.image=29 is not a multiple of vision.patch=14"),
    ({"image_token_id": 511}, "image_token_index=512, image_token_id=511 disagree"),
]


def rewritten(source, to, fields):
    """A copy of a folder with other fields in its config.json."""
    shutil.copytree(source, to)
    values = json.loads((to / "config.json").read_text())
    for name, value in fields.items():
        *outer, last = name.split(".")
        (values[outer[0]] if outer else values)[last] = value
    (to / "config.json").write_text(json.dumps(values))
    return to


@pytest.mark.parametrize("fields, said", CONFIGS, ids=lambda x: str(x)[:40])
def test_what_a_config_says_and_is_not_computed_is_refused(fields, said, folders, tmp_path):
    (source,) = folders["hub"]
    with pytest.raises(ValueError) as error:
        open_source(rewritten(source, tmp_path / "hf", fields))
    assert str(error.value).startswith(f"{tmp_path / 'hf/config.json'}: {said}") and "\n" not in str(error.value)


def test_a_rope_scaling_that_is_none_is_none(folders, tmp_path):
    (source,) = folders["hub"]
    fields = {
        "text_config.rope_scaling": {"rope_type": "default"},
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    assert open_source(rewritten(source, tmp_path / "hf", fields)).llama == open_source(source).llama


def test_weights_that_cannot_be_a_model_do_not_go_out(folders, tokenizer, tmp_path):
    source = opened(folders["hub"], tokenizer)
    broken = source.leaves["llama/blocks/1/w_up"].then(lambda t: t * torch.inf if not t.is_meta else t)
    nans = dataclasses.replace(source, leaves={**source.leaves, "llama/blocks/1/w_up": broken})
    with pytest.raises(ValueError, match="llama/blocks/1/w_up holds NaN or an infinite value; the file"):
        export.export(nans, tmp_path / "out", "llava_fn")
    small = {k: x.then(lambda t: t * 0.001) for k, x in source.leaves.items() if "norm" in k and k.startswith("llama")}
    delta = dataclasses.replace(source, leaves={**source.leaves, **small})
    with pytest.raises(ValueError, match="is a delta, not a model: all its norms are near 0; add it to its base first"):
        export.export(delta, tmp_path / "out", "llava_fn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {"model.mm_projector.weight": t["model.mm_projector.0.weight"]}, ["unexpected: projector's weight"]),
        (lambda t: {k: x[:0] for k, x in t.items()}, ["wrong shape: the projector's first matrix is .0, 128.; ZeRO 3"]),
        (lambda t: {k: x for k, x in t.items() if "0.w" not in k}, ["1 tensors:", "missing: projector's 0.weight"]),
        (lambda t: t | {"model.mm_projector.4.bias": torch.zeros(3)}, ["1 tensors:", "unexpected: projector's 4.bias"]),
    ],
    ids=["linear", "empty", "half", "deeper"],
)
def test_another_projector_is_refused_by_its_tensors(change, said, state, tmp_path):
    path = tmp_path / "mm_projector.bin"
    layouts.write_projector(path, state)
    torch.save(change(torch.load(path, weights_only=True)), path)
    for text in said:
        with pytest.raises(ValueError, match=text):
            open_source(path)


def test_all_that_does_not_fit_is_listed_in_one_error(folders, tmp_path):
    (source,), broken = folders["hybrid"], tmp_path / "hf"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    tensors["language_model.model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3, 3, dtype=torch.float16)
    tensors["language_model.model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 256, dtype=torch.int8)
    tensors["model.language_model.embed_tokens.weight"] = torch.zeros(576, 256)
    turned = "language_model.model.layers.0.mlp.down_proj.weight"
    tensors[turned] = tensors[turned].T.contiguous()
    tensors["image_newline"] = torch.zeros(2)
    tensors["language_model.model.layers.2.input_layernorm.weight"] = torch.zeros(256)
    del tensors["vision_tower.encoder.layers.3.layer_norm1.weight"]  # of a block that never runs: whole or not at all
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        open_source(broken)
    said = str(caught.value)
    assert "hf (Hugging Face or liuhaotian) does not fit its model, 8 tensors" in said
    for line in (
        "missing: llama's norm.weight", "unexpected: image_newline",
        "wrong shape: layers.0.mlp.gate_proj.weight is (3, 3), the config wants (40, 256)",
        "wrong shape: layers.0.mlp.down_proj.weight is (40, 256), the config wants (256, 40)",
        "wrong dtype: layers.1.mlp.up_proj.weight is torch.int8",
        "duplicate: language_model.model.embed_tokens.weight is llama's embed_tokens.weight",
        "unexpected: llama's layers.2.input_layernorm.weight", "missing: vision's encoder.layers.3.layer_norm1.weight",
    ):  # fmt: skip
        assert line in said, (line, said)


def test_a_projector_under_two_kinds_of_names_is_refused(state, tmp_path):
    path = layouts.write_projector(tmp_path / "p.bin", state)
    both = torch.load(path) | {n: t for n, t in state.items() if n.startswith("multi_modal")}
    torch.save(both, path)
    with pytest.raises(ValueError, match="duplicate: the projector is held under two kinds of names"):
        open_source(path)


def test_a_tied_head_must_be_the_embedding(tokenizer, tmp_path):
    c = dataclasses.replace(C, llama=dataclasses.replace(C.llama, tied=True))
    state = layouts.hub(layouts.hf_model(c))
    vicuna = layouts.write_vicuna(tmp_path / "tied", state, "bin", tokenizer.model, c)
    assert "llama/head" not in open_source(vicuna).leaves
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"] * 2
    vicuna = layouts.write_vicuna(tmp_path / "loose", state, "safetensors", tokenizer.model, c)
    with pytest.raises(ValueError, match="wrong values: lm_head.weight is not the embedding"):
        open_source(vicuna)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"mm_projector_type": "linear"}, 'mm_projector_type="linear"; only "mlp2x_gelu"'),
        ({"mm_vision_select_feature": "cls_patch"}, 'mm_vision_select_feature="cls_patch"'),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=true"),
        ({"model_type": "llava_mistral"}, 'model_type="llava_mistral"; only "llava_llama"'),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters.factor=2.0; this Llama scales its rotary",
        ),
        ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer=.-2, -5.; it must be one whole"),
    ],
)
def test_models_that_compute_something_else_are_refused(change, said, folders, tmp_path):
    (source,) = folders["liuhaotian with its tower"]
    folder = tmp_path / "other"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=said):
        open_source(folder)


def test_a_projector_for_another_layer_of_an_absent_tower_is_refused(state, tokenizer, tmp_path):
    folder = layouts.write_liuhaotian(tmp_path / "liu", state, False, tokenizer.model)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"mm_vision_select_layer": -1}))
    with pytest.raises(ValueError, match="reads hidden state -1 of an image tower that is not in"):
        open_source(folder)


def test_what_is_no_model_is_named(tmp_path, folders, state, tokenizer):
    with pytest.raises(ValueError, match="nothing.pt: no such file or folder"):
        open_source(tmp_path / "nothing.pt")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors holds 2 tensors of an unknown layout .a, b"):
        open_source(tmp_path / "x.safetensors")
    bare = folders["OpenAI CLIP, Vicuna, mm_projector.bin"][1] / "pytorch_model-00001-of-00003.bin"
    with pytest.raises(ValueError, match="give the folder with its config.json"):
        open_source(bare)
    (tmp_path / "save_dir/iter_0000001/mp_rank_00").mkdir(parents=True)
    (tmp_path / "save_dir/latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(ValueError, match="names '2', but there is no .*iter_0000002"):
        open_source(tmp_path / "save_dir")
    two = layouts.write_megatron(tmp_path / "two", state)
    (two / "iter_0005000/mp_rank_01").mkdir()
    (two / "iter_0005000/mp_rank_01/model_optim_rng.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="written by 2 ranks"):
        open_source(two)


def test_parts_that_do_not_belong_together_are_refused(folders, state, tokenizer, tmp_path):
    openai, vicuna, projector = folders["OpenAI CLIP, Vicuna, mm_projector.bin"]
    with pytest.raises(ValueError, match="both bring the projector; give one of them"):
        opened([*folders["hub"], projector], tokenizer)
    narrow = dataclasses.replace(C, llama=dataclasses.replace(C.llama, width=128, heads=1, kv_heads=1))
    other = layouts.write_projector(tmp_path / "narrow.bin", layouts.hub(layouts.hf_model(narrow)))
    with pytest.raises(ValueError, match="projector fits a llama of width 128, not 256"):
        opened([openai, vicuna, other], tokenizer)
    with pytest.raises(ValueError, match="does not bring the vision; name a source for it too"):
        export.export(opened([vicuna, projector], tokenizer), tmp_path / "out", "llava_fn")
    with pytest.raises(ValueError, match="does not bring the projector, part of llava-hf"):
        export.export(opened([openai, vicuna], tokenizer), tmp_path / "out", "llava-hf")
    with pytest.raises(ValueError, match="has no tokenizer.model; give one with --tokenizer"):
        export.export(model.merge([open_source(p) for p in folders["MindSpeed-MM"]]), tmp_path / "out", "llava_fn")
    assert list(tmp_path.iterdir()) == [other]
    small = dataclasses.replace(C, llama=dataclasses.replace(C.llama, vocab=500))
    few = layouts.write_vicuna(tmp_path / "few", {n: t[:500] if len(t) == 576 else t for n, t in state.items()},
                               "bin", tokenizer.model, small)  # fmt: skip
    with pytest.raises(ValueError, match="the tokenizer has 512 pieces, the decoder 500"):
        opened([few], tokenizer)
    bare = layouts.write_clip(tmp_path / "clip", state, False)
    (bare / "tokenizer.model").write_bytes(tokenizer.model + b"\x1a\x02\x18\x00")
    with pytest.raises(ValueError, match="clip and .* differ in tokenizer; give only sources that agree"):
        opened([bare, vicuna], tokenizer)


def test_a_checkpoint_with_a_base_goes_out_whole(folders, tokenizer, tmp_path):
    """As a run of the first stage leaves it: the projector, and a reference to where the rest stands."""
    openai, vicuna, projector = folders["OpenAI CLIP, Vicuna, mm_projector.bin"]
    export.export(opened([openai, vicuna], tokenizer), tmp_path / "base", "llava_fn")
    base = checkpoint.Base(str(tmp_path / "base"), checkpoint.fingerprint(tmp_path / "base"))
    manifest = checkpoint.Manifest(C, ("projector",), "pad", "plain", None, 7, base)
    params = model.load(open_source(projector))
    checkpoint.save(tmp_path / "000007", manifest, tree.cast(params, torch.float32), None, tokenizer.model)
    source = model.merge([open_source(tmp_path / "000007")])
    want = opened([openai, vicuna, projector], tokenizer)
    for path, x in want.leaves.items():
        assert torch.equal(source.leaves[path].read().float(), x.read().float()), path
    export.export(source, tmp_path / "out", "liuhaotian")
    assert model.merge([open_source(tmp_path / "out")]).image_mode == "pad"
    same(ordered(want.spare), ordered(source.spare), "what LLaVA never reads")
    both = model.merge([open_source(tmp_path / "base"), open_source(projector)])
    same(ordered(want.leaves), ordered(both.leaves), "a base of ours and a projector")
    (tmp_path / "base/params.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="base is damaged: SHA256SUMS does not agree with params.safetensors"):
        open_source(tmp_path / "000007")
    shutil.rmtree(tmp_path / "base")
    export.export(want, tmp_path / "base", "llava_fn")
    with pytest.raises(ValueError, match="is not the one that was trained on"):
        open_source(tmp_path / "000007")


@pytest.mark.parametrize("name", ["hub", "MindSpeed-MM"])
def test_ranks_load_their_blocks_of_the_whole(name, folders, tokenizer):
    source = opened(folders[name], tokenizer)
    source = dataclasses.replace(source, leaves={k: v for k, v in source.leaves.items() if k.startswith("llama")})
    whole, ranks = model.load(source), [model.load(source, Mesh(tp=Axis("tp", 2, r))) for r in range(2)]
    for path in tree.paths(whole):
        if ranks[0][path].shape == whole[path].shape:
            assert torch.equal(ranks[0][path], whole[path])
        else:
            dim = next(d for d in range(2) if ranks[0][path].shape[d] != whole[path].shape[d])
            assert torch.equal(torch.cat([rank[path] for rank in ranks], dim), whole[path]), path
    assert ranks[1]["llama", "embed"].shape == (256, 256)


def test_a_rank_touches_only_its_own_pages(tokenizer, tmp_path):
    c = dataclasses.replace(C, llama=dataclasses.replace(C.llama, vocab=2**16, blocks=1))
    state = {f"language_model.{n}": torch.zeros(p, dtype=torch.float16) for n, p in {
        "model.embed_tokens.weight": (2**16, 256), "lm_head.weight": (2**16, 256), "model.norm.weight": (256,),
        "model.layers.0.input_layernorm.weight": (256,), "model.layers.0.post_attention_layernorm.weight": (256,),
        "model.layers.0.self_attn.q_proj.weight": (256, 256), "model.layers.0.self_attn.k_proj.weight": (128, 256),
        "model.layers.0.self_attn.v_proj.weight": (128, 256), "model.layers.0.self_attn.o_proj.weight": (256, 256),
        "model.layers.0.mlp.gate_proj.weight": (40, 256), "model.layers.0.mlp.up_proj.weight": (40, 256),
        "model.layers.0.mlp.down_proj.weight": (256, 40)}.items()}  # fmt: skip
    folder = layouts.write_vicuna(tmp_path / "wide", state, "safetensors", tokenizer.model, c)
    (folder / "tokenizer.model").unlink()  # of another vocabulary
    source = open_source(folder)
    file = next(a.path for a in source.archives if "model.embed_tokens.weight" in a.tensors)
    rank = Mesh(tp=Axis("tp", 8, 3))
    block = source.leaves["llama/embed"].read()[spec.shard(spec.linear(2**16, 256, ("vocab", None)), rank)]
    assert len(block.clone()) == 2**13
    assert resident(file) < block.nbytes + 2**22 < 2**16 * 256 * 2 / 3
