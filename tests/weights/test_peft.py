"""PEFT's folders in and out, against peft itself on transformers' LLaVA; and every field that is refused."""

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import layouts
import pytest
import torch
from oracles import CONFIGS, HF_IMAGE, hf_llava, ours, sample
from safetensors.torch import load_file, save_file

from llava_fn import config, llava, lora, spec, tree, vit
from llava_fn.batch import IMAGE, collate
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.parallel.mesh import Mesh
from llava_fn.weights import export, model, peft, peft_config
from llava_fn.weights.source import open_source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

C = CONFIGS[0]
CPU = torch.device("cpu")
SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # meets CLIP's q, k, v as well


def their_logits(hf, s):
    ids = torch.tensor(s.ids)
    with torch.no_grad():
        out = hf(input_ids=torch.where(ids == IMAGE, HF_IMAGE, ids)[None], pixel_values=vit.normalise(s.pixels))
    return out.logits[0, :, :HF_IMAGE]  # the rows from there on are none of the text vocabulary


def our_logits(params, s):
    batch = collate([s])
    x = llava.forward(params, batch, C)
    return llava.llama.logits(params["llama"], x, C.llama), batch.stream.read


def train(folder: Path, **how) -> tuple[Path, torch.Tensor]:
    """A folder that peft has written, of a model whose adapters and saved modules are away from zero; its logits."""
    how = {"r": 4, "lora_alpha": 6, "target_modules": SUFFIXES} | how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(hf_llava(C), LoraConfig(**how)).eval()
        rng = torch.Generator().manual_seed(4)
        for name, p in trained.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                p.data += 0.1 * torch.randn(p.shape, generator=rng)
        trained.save_pretrained(folder)
    return folder, their_logits(trained, S)


S = sample(C, 1, "pip3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """transformers' folder of the base."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    hf_llava(C).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return train(tmp_path_factory.mktemp("peft"), modules_to_save=["multi_modal_projector"])


def renamed(folder: Path, to: Path, change, **fields) -> Path:
    """A copy whose tensors have other names and whose config has other fields."""
    to.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({change(name): t for name, t in tensors.items()}, to / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text()) | fields
    (to / "adapter_config.json").write_text(json.dumps(values))
    return to


def loaded(*paths):
    source = model.merge([open_source(path) for path in paths])
    return lora.attached(model.load(source), model.adapters(source, Mesh(), CPU, torch.float32)), source


def close(a, b):
    assert (a - b).abs().max().item() <= 1e-5 * max(1.0, b.abs().max().item())


STYLES = {
    "transformers 5": lambda name: name,
    "transformers 4": lambda name: name.replace("model.model.language_model.", "model.language_model.model.").replace(
        "model.model.multi_modal", "model.multi_modal"
    ),
    "LLaVA's code": lambda name: (
        name.replace("model.language_model.", "model.")
        .replace("vision_tower.encoder", "vision_tower.vision_tower.vision_model.encoder")
        .replace("multi_modal_projector.linear_1", "mm_projector.0")
        .replace("multi_modal_projector.linear_2", "mm_projector.2")
    ),
    "the adapter's name in it": lambda name: name.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_what_peft_trained_gives_its_logits_unmerged_and_merged(style, base, adapter, tmp_path, capsys):
    folder, want = adapter
    there = renamed(folder, tmp_path / "renamed", STYLES[style])
    params, source = loaded(there, base)
    assert {path.split("/")[0] for path in source.lora} == {"vision", "llama"}  # a suffix meets CLIP too
    assert f"the projector of {there} replaces that of {base}" in capsys.readouterr().err
    got, read = our_logits(params, S)
    close(got, want[read])
    close(our_logits(model.load(model.merge_lora(source)), S)[0], want[read])
    plain, _ = our_logits(ours(hf_llava(C), C), S)
    assert (got - plain[:, :HF_IMAGE]).abs().max() > 0.01


@pytest.mark.parametrize(
    "how",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 9, "q_proj": 3}},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["rslora", "patterns", "all linear layers", "gaussian"],
)
def test_variants_that_are_plain_lora_give_pefts_logits(how, base, tmp_path):
    folder, want = train(tmp_path / "adapter", **how)
    got, read = our_logits(loaded(base, folder)[0], S)
    close(got, want[read])


@pytest.mark.parametrize(
    "how", [{}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}], ids=["one rank", "two ranks"]
)
def test_what_goes_out_is_read_by_peft_with_equal_logits(how, base, adapter, tmp_path):
    folder, want = train(tmp_path / "adapter", modules_to_save=["multi_modal_projector"], **how)
    export.export(loaded(base, folder)[1], tmp_path / "out", "peft")
    again = PeftModel.from_pretrained(hf_llava(C), tmp_path / "out").eval()
    close(their_logits(again, S), want)
    got, read = our_logits(loaded(tmp_path / "out", base)[0], S)
    close(got, want[read])


DECODER = r".*language_model\.layers\.\d+\.(self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj|self_attn\.o_proj"
TARGETS = {  # of the decoder, in transformers' names -> what is written
    "all": (SUFFIXES, DECODER + r"|mlp\.gate_proj|mlp\.up_proj|mlp\.down_proj)"),
    "two": (["v_proj", "q_proj"], r".*language_model\.layers\.\d+\.(self_attn\.q_proj|self_attn\.v_proj)"),
    "one block": (["2.mlp.up_proj"], ["model.language_model.layers.2.mlp.up_proj"]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_adapters_of_the_decoder_go_out_under_an_expression_that_leaves_clip_alone(case, base, tmp_path):
    kinds, written = TARGETS[case]
    inner = "|".join(name if "." in name else rf"\d+\.\w+\.{name}" for name in kinds)
    folder, want = train(tmp_path / "adapter", target_modules=rf".*language_model\.layers\.({inner})")
    export.export(loaded(base, folder)[1], tmp_path / "out", "peft")
    values = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert values["target_modules"] == written and values["modules_to_save"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of adapters that the folder lacks
        again = PeftModel.from_pretrained(hf_llava(C), tmp_path / "out").eval()
    close(their_logits(again, S), want)
    export.export(open_source(folder), tmp_path / "alone", "peft")  # without a base its number of blocks is not known
    values = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    assert isinstance(values["target_modules"], list)
    close(their_logits(PeftModel.from_pretrained(hf_llava(C), tmp_path / "alone").eval(), S), want)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run of ours that trained the projector and adapters of every linear layer, and its base, also as hf."""
    root, c = tmp_path_factory.mktemp("run"), config.Lora(rank=3, alpha=4.0, targets=(".*",))
    layouts.write_llava_hf(root / "hf", layouts.hub(layouts.hf_model(dtype=torch.float32)), "hub", tokenizer.model)
    export.export(open_source(root / "hf"), root / "base", "llava_fn")
    parts = ("projector", "lora")
    fresh = spec.init(spec.only(lora.extended(llava.spec(layouts.C), c), parts), 0)
    rng = torch.Generator().manual_seed(3)
    params = tree.rebuild(fresh, [x + 0.1 * torch.randn(x.shape, generator=rng) for x in tree.values(fresh)])
    record = checkpoint.Base(str(root / "base"), checkpoint.fingerprint(root / "base"))
    manifest = checkpoint.Manifest(layouts.C, parts, "square", "v1", None, base=record, lora=c)
    checkpoint.save(root / "run/checkpoints/000003", manifest, params, None, tokenizer.model)
    return root


def test_a_run_of_ours_is_read_by_peft_with_equal_logits(run, tmp_path):
    params, source = loaded(run / "run")
    assert {path.split("/")[0] for path in source.lora} == {"vision", "projector", "llama"}
    export.export(source, tmp_path / "out", "peft")
    names = set(load_file(tmp_path / "out" / peft.TENSORS))
    assert not [name for name in names if "projector" in name and "lora" in name]  # PEFT saves a module, or adapts it
    again = PeftModel.from_pretrained(layouts.HFLlava.from_pretrained(run / "hf"), tmp_path / "out").eval()
    s = sample(layouts.C, 1, "pip3")
    ids = torch.tensor(s.ids)
    with torch.no_grad():
        ids = torch.where(ids == IMAGE, layouts.C.llama.vocab, ids)[None]
        want = again(input_ids=ids, pixel_values=vit.normalise(s.pixels)).logits[0, :, : layouts.C.llama.vocab]
    batch = collate([s])
    for p in (params, loaded(run / "hf", tmp_path / "out")[0], loaded(tmp_path / "out", run / "base")[0]):
        got = llava.llama.logits(p["llama"], llava.forward(p, batch, layouts.C), layouts.C.llama)
        close(got, want[batch.stream.read])


def test_what_goes_out_in_the_names_of_llavas_code_comes_back(run, tmp_path):
    params, source = loaded(run / "run")
    export.export(dataclasses.replace(source, image_mode="pad"), tmp_path / "out", "peft-liuhaotian")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {peft.CONFIG, peft.TENSORS, peft.OTHERS, "config.json"}
    names = set(load_file(tmp_path / "out" / peft.TENSORS))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert (
        "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_B.weight" in names
    )
    extra = torch.load(tmp_path / "out" / peft.OTHERS, weights_only=True)
    assert set(extra) == {f"base_model.model.model.mm_projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    again, back = loaded(tmp_path / "out", run / "hf")
    assert back.image_mode == "pad"  # as LLaVA's config.json says
    batch = collate([sample(layouts.C, 1, "pip3")])
    close(*(llava.forward(p, batch, layouts.C) for p in (again, params)))


def test_the_config_of_a_quantised_base_does_not_matter_to_adapters(run, tmp_path):
    """LLaVA's QLoRA saves the config of the base that it quantised with the adapters, which are not quantised."""
    _, source = loaded(run / "run")
    export.export(source, tmp_path / "out", "peft-liuhaotian")
    values = json.loads((tmp_path / "out/config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    assert open_source(tmp_path / "out").lora.keys() == {k for k in source.lora if not k.startswith("projector")}


def test_llavas_decoder_goes_out_under_an_expression_too(run, tmp_path):
    _, source = loaded(run / "run")
    decoder = {path: x for path, x in source.lora.items() if path.startswith("llama/")}
    export.export(dataclasses.replace(source, lora=decoder), tmp_path / "out", "peft-liuhaotian")
    pattern = json.loads((tmp_path / "out" / peft_config.CONFIG).read_text())["target_modules"]
    assert re.fullmatch(pattern, "model.layers.1.mlp.up_proj")
    tower = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"
    assert not re.fullmatch(pattern, tower)


def test_llavas_code_needs_the_config_of_the_whole_model(adapter, tmp_path):
    with pytest.raises(ValueError, match="name the sources of the image tower and the decoder too, and a --tokenizer"):
        export.export(open_source(adapter[0]), tmp_path / "out", "peft-liuhaotian")
    assert not (tmp_path / "out").exists()


def test_a_whole_layout_is_not_written_with_adapters_beside_it(base, adapter, tmp_path):
    _, source = loaded(base, adapter[0])
    with pytest.raises(ValueError, match="holds LoRA adapters; give --merge-lora to add them .* or --to peft"):
        export.export(source, tmp_path / "out", "llava-hf")
    with pytest.raises(ValueError, match="peft is for adapters and a projector, and there are no adapters"):
        export.export(loaded(base)[1], tmp_path / "out", "peft")


def test_weights_are_cast_on_the_way(base, adapter):
    source = model.cast(loaded(base, adapter[0])[1], torch.bfloat16)
    params = model.load(source)
    assert {x.dtype for x in tree.values(params)} == {torch.bfloat16} == {x.dtype for x in source.leaves.values()}
    assert {x.read().dtype for pair in source.lora.values() for x in pair[:2]} == {torch.bfloat16}


def test_a_number_beyond_the_dtypes_range_is_named(base):
    source = model.merge([open_source(base)])
    wide = dict(source.leaves) | {"llama/norm": Leaf.of(torch.full((48,), 7e4))}
    assert model.cast(dataclasses.replace(source, leaves=wide), torch.bfloat16).leaves["llama/norm"].read()[0] > 6e4
    cast = model.cast(dataclasses.replace(source, leaves=wide), torch.float16)
    with pytest.raises(ValueError, match="llama/norm holds 7e.04, beyond the range of torch.float16; write another"):
        cast.leaves["llama/norm"].read()


# What W + scale B A does not express.

REFUSED = [
    ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
    ({"init_lora_weights": "pissa_niter_16"}, 'init_lora_weights="pissa_niter_16"'),
    ({"init_lora_weights": "olora"}, 'init_lora_weights="olora"'),
    ({"init_lora_weights": "corda"}, 'init_lora_weights="corda"'),
    ({"init_lora_weights": "loftq"}, 'init_lora_weights="loftq"'),
    ({"init_lora_weights": "lora_ga"}, 'init_lora_weights="lora_ga"'),
    ({"use_dora": True}, "use_dora=true"),
    ({"lora_bias": True}, "lora_bias=true"),
    ({"bias": "lora_only"}, 'bias="lora_only"'),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=true"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
    ({"target_parameters": ["x"]}, "target_parameters="),
    ({"trainable_token_indices": [5]}, "trainable_token_indices="),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
    ({"use_qalora": True}, "use_qalora=true"),
    ({"use_bdlora": {"x": 1}}, "use_bdlora="),
    ({"kasa_config": {"x": 1}}, "kasa_config="),
    ({"arrow_config": {"x": 1}}, "arrow_config="),
    ({"monteclora_config": {"x": 1}}, "monteclora_config="),
    ({"megatron_config": {"x": 1}}, "megatron_config="),
    ({"loftq_config": {"bits": 4}}, "loftq_config="),
    ({"from_nowhere": 1}, "from_nowhere=1"),
    ({"peft_type": "IA3"}, 'peft_type="IA3"'),
    ({"r": None}, "r=null; it must be a whole number above 0"),
    ({"r": "8"}, 'r="8"; it must be a whole number above 0'),
    ({"r": 0}, "r=0; it must be a whole number above 0"),
    ({"lora_alpha": "6"}, 'lora_alpha="6"; it must be a number above 0'),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: '.' is no regular expression"),
    ({"rank_pattern": {"q_proj": None}}, r"rank_pattern\.q_proj=null; it must be a whole number"),
    ({"r": 5}, "is .4, 48., not of rank 5"),
    ({"use_rslora": "false"}, 'use_rslora="false"; it must be true or false'),
    ({"alpha_pattern": [4]}, r"alpha_pattern=\[4\]; it must be an object"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path=5; it must be a text"),
    ({"modules_to_save": "projector"}, 'modules_to_save="projector"; it must be a list of texts'),
    ({"modules_to_save": [1]}, r"modules_to_save=\[1\]; it must be a list of texts"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: only the projector is supported"),
]


@pytest.mark.parametrize("fields, said", REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_more_than_plain_lora_is_refused_by_its_field(fields, said, adapter, tmp_path):
    there = renamed(adapter[0], tmp_path / "renamed", lambda name: name, **fields)
    with pytest.raises(ValueError, match=said) as error:
        open_source(there)
    assert str(there) in str(error.value)


def test_a_config_without_a_rank_is_refused(adapter, tmp_path):
    there = renamed(adapter[0], tmp_path / "renamed", lambda name: name)
    values = json.loads((there / peft.CONFIG).read_text())
    del values["r"]
    (there / peft.CONFIG).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="adapter_config.json: r is missing; it must be a whole number above 0"):
        open_source(there)
    (there / peft.CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json: r is missing; it must be a whole number above 0"):
        open_source(there)
    (there / peft.CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json is not a JSON object"):
        open_source(there)


def test_every_field_of_pefts_config_is_used_harmless_or_refused():
    """A field that a new PEFT brings is refused where it is set, and this test names it."""
    known = set(peft_config.TABLE)
    refused = {next(iter(fields)) for fields, said in REFUSED if said.startswith(next(iter(fields)))}
    assert set(LoraConfig.__dataclass_fields__) <= known | refused | {"corda_config", "lora_ga_config"}


WRITTEN = {  # what PEFT itself writes, and what is said of it
    "embeddings and head": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save=.'lm_head', 'embed_tok"),
    "adapted embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens.base_layer.weight .1 tensors.",
    ),
    "adapted head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight .1 tensors.: only a"),
    "biases": ({"bias": "lora_only"}, 'bias="lora_only"; more than'),
    "biases of B": ({"lora_bias": True}, "lora_bias=true; more than"),
    "DoRA": ({"use_dora": True}, "use_dora=true; more than"),
    "tokens": (
        {"trainable_token_indices": {"embed_tokens": [1]}},
        'trainable_token_indices=."embed_tokens": .1..; more',
    ),
    "half a projector": ({"modules_to_save": ["linear_1"]}, "missing: projector's linear_2.weight"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_peft_writes_beside_plain_adapters_is_refused(case, tmp_path):
    how, said = WRITTEN[case]
    with pytest.raises(ValueError, match=said) as error:
        open_source(train(tmp_path / "adapter", **how)[0])
    assert case == "half a projector" or "merge the adapters with PEFT" in str(error.value)


def test_modules_to_save_without_their_tensors_are_named(base, tmp_path):
    folder, _ = train(tmp_path / "adapter")
    there = renamed(folder, tmp_path / "renamed", lambda name: name, modules_to_save=["multi_modal_projector"])
    with pytest.raises(ValueError, match="modules_to_save names multi_modal_projector, and no tensor of it is in"):
        open_source(there)


def changed(folder: Path, to: Path, change) -> Path:
    """A copy with other tensors, which torch saves, as older versions of PEFT do."""
    shutil.copytree(folder, to)
    (to / peft.TENSORS).unlink()
    torch.save(change(load_file(folder / peft.TENSORS)), to / "adapter_model.bin")
    return to


def each(kind: str, change):
    return lambda tensors: {name: change(t) if kind in name else t for name, t in tensors.items()}


FLAWS = {
    "another name": (
        lambda tensors: tensors | {k.replace("lora_A.", "lora_A.default."): t for k, t in tensors.items()},
        "layers.0.mlp.up_proj.lora_A.default.weight is a duplicate under another name",
    ),
    "integers": (each("lora_B", lambda t: t.to(torch.int8)), "q_proj.lora_B.weight is torch.int8; weights are"),
    "infinite": (each("lora_A", lambda t: t / 0), "q_proj.lora_A.weight holds NaN or an infinite value"),
    "a projector of NaN": (
        each("projector", lambda t: t * torch.nan),
        "linear_1.weight holds NaN or an infinite value",
    ),
    "ZeRO 3's": (each("projector", lambda t: t[:0]), "linear_1.weight is empty, as ZeRO 3 saves a parameter that it"),
    "none": (lambda tensors: {k: t for k, t in tensors.items() if "lora" not in k}, "json, but no adapters; download"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_tensors_that_are_no_adapters_are_named(case, adapter, tmp_path):
    change, said = FLAWS[case]
    with pytest.raises(ValueError, match=said):
        open_source(changed(adapter[0], tmp_path / "changed", change))


def test_adapters_that_torch_saved_are_read(base, adapter, tmp_path):
    folder, want = adapter
    got, read = our_logits(loaded(base, changed(folder, tmp_path / "bin", lambda tensors: tensors))[0], S)
    close(got, want[read])


def test_tensors_without_a_place_partner_or_finite_values_are_listed(adapter, tmp_path):
    there = renamed(adapter[0], tmp_path / "renamed", lambda name: name)
    tensors = load_file(there / peft.TENSORS)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors[name.format("A")][0, 0] = torch.nan
    del tensors[name.format("B").replace("q_proj", "k_proj")]
    tensors["base_model.model.model.language_model.layers.0.self_attn.r_proj.lora_A.weight"] = torch.zeros(4, 4)
    save_file(tensors, there / peft.TENSORS)
    with pytest.raises(ValueError, match="3 adapter tensors do not fit") as error:
        open_source(there)
    for said in ("q_proj.lora_A.weight holds NaN", "r_proj.lora_A.weight belongs to no linear", "0/wk has only its A"):
        assert said in str(error.value)


def test_adapters_of_another_base_are_refused_or_warned_of(base, adapter, tmp_path, capsys):
    there = renamed(adapter[0], tmp_path / "renamed", lambda name: name, base_model_name_or_path="someone/vicuna-13b")
    bases = [tmp_path / "models--someone--vicuna-13b/snapshots/0af", tmp_path / "vicuna-13b", base]
    for path in bases[:2]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(base)
    for path in bases:
        model.merge([open_source(path), open_source(there)])
        warned = f"warning: the adapters of {there} name the base someone/vicuna-13b, not {path}\n"
        assert (warned in capsys.readouterr().err) == (path == base)
    wide = {path: Leaf.of(torch.zeros(3, 3)) for path in ("llama/blocks/0/wq",)}
    with pytest.raises(ValueError, match="do not fit the weights: llama/blocks/0/wq is .3, 3., not .48, 48."):
        source = open_source(adapter[0])
        peft.check(wide, {"llama/blocks/0/wq": source.lora["llama/blocks/0/wq"]}, "x")
    with pytest.raises(ValueError, match="both hold adapters; give one of them"):
        model.merge([open_source(base), open_source(there), open_source(adapter[0])])
