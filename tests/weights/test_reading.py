"""Every foreign JSON that is read: fields from nowhere are refused, files that other programs write are not."""

import json
import shutil

import layouts
import public_configs as public
import pytest
import torch
import transformers
from layouts import C
from peft import LoraConfig
from transformers import CLIPConfig, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig

from llava_fn import config, fields
from llava_fn.checkpoint.leaf import Leaf
from llava_fn.weights import configs, export, hub, image_processor, model, peft_config, vocabulary
from llava_fn.weights.source import Weights, open_source


@pytest.fixture(scope="module")
def state():
    return layouts.hub(layouts.hf_model())


@pytest.fixture(scope="module")
def folder(state, tokenizer, tmp_path_factory):
    """A llava-hf folder with every JSON that is read. Never write to it."""
    root = tmp_path_factory.mktemp("reading")
    layouts.write_llava_hf(root / "in", state, "hub", tokenizer.model)
    export.export(model.merge([open_source(root / "in")]), root / "hf", "llava-hf")
    return root / "hf"


def changed(source, to, file, change):
    """A copy of a folder with other fields in one JSON file. change: (dotted path, value)."""
    shutil.copytree(source, to)
    values = json.loads((to / file).read_text()) if (to / file).is_file() else {}
    *outer, last = change[0].split(".")
    inner = values
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = change[1]
    (to / file).write_text(json.dumps(values))
    return to


READERS = [  # file -> where a field from nowhere may stand in it
    ("config.json", ""), ("config.json", "text_config."), ("config.json", "vision_config."),
    ("config.json", "text_config.rope_parameters."), ("preprocessor_config.json", ""), ("processor_config.json", ""),
    ("processor_config.json", "image_processor."), ("generation_config.json", ""), ("tokenizer_config.json", ""),
    ("special_tokens_map.json", ""),
]  # fmt: skip


@pytest.mark.parametrize("file, inside", READERS)
@pytest.mark.parametrize("value", [7, False, {"x": 1}], ids=str)
def test_a_field_from_nowhere_is_refused_by_file_field_and_value(file, inside, value, folder, tmp_path):
    there = changed(folder, tmp_path / "hf", file, (f"{inside}a_field_from_nowhere", value))
    with pytest.raises(ValueError) as error:
        open_source(there)
    assert str(error.value).startswith(f"{there / file}: {inside}a_field_from_nowhere={json.dumps(value)}; ")
    assert "\n" not in str(error.value)


TABLES = {  # the readers whose folders are not the one above
    "a CLIP": lambda x: configs.stated("f.json", {"model_type": "clip"} | x),
    "a CLIP's tower": lambda x: configs.stated("f.json", {"model_type": "clip", "vision_config": x}),
    "a tower": lambda x: configs.stated("f.json", {"model_type": "clip_vision_model"} | x),
    "a Llama": lambda x: configs.stated("f.json", {"model_type": "llama"} | x),
    "LLaVA's": lambda x: configs.stated("f.json", {"model_type": "llava_llama"} | x),
    "LLaVA's tower": lambda x: configs.stated("f.json", {"model_type": "llava_llama", "mm_vision_config": x}),
    "PEFT's": lambda x: peft_config.read("f.json", public.PEFT_06 | x),
}


@pytest.mark.parametrize("name", TABLES)
def test_each_table_refuses_a_field_from_nowhere(name):
    with pytest.raises(ValueError, match=r"f\.json: (vision_config\.|mm_vision_config\.)?a_field_from_nowhere=7; "):
        TABLES[name]({"a_field_from_nowhere": 7})
    TABLES[name]({"a_field_from_nowhere": None})


WRONG = [  # file, field, value that is no such thing
    ("config.json", "text_config", [1]), ("config.json", "text_config.hidden_size", "128"),
    ("config.json", "text_config.hidden_size", True), ("config.json", "text_config.num_hidden_layers", None),
    ("config.json", "text_config.rms_norm_eps", float("nan")), ("config.json", "vision_config.layer_norm_eps", "1e-5"),
    ("config.json", "vision_config.hidden_act", "relu"), ("config.json", "text_config.rope_theta", 0),
    ("config.json", "text_config.tie_word_embeddings", "no"), ("config.json", "image_token_index", -1),
    ("config.json", "text_config.head_dim", 1.5), ("config.json", "text_config.rope_scaling", "linear"),
    ("config.json", "text_config.eos_token_id", "</s>"), ("config.json", "text_config.is_causal", False),
    ("config.json", "model_type", "qwen2_vl"), ("config.json", "auto_map", {"AutoModel": "m.M"}),
    ("preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5]), ("preprocessor_config.json", "image_std", [1, 1, 1]),
    ("preprocessor_config.json", "size", "336"), ("preprocessor_config.json", "size.shortest_edge", 0),
    ("preprocessor_config.json", "size.longest_edge", 336), ("preprocessor_config.json", "size", 224),
    ("processor_config.json", "patch_size", 7), ("preprocessor_config.json", "do_pad", 1),
    ("preprocessor_config.json", "rescale_factor", 1), ("processor_config.json", "patch_size", "14"),
    ("processor_config.json", "vision_feature_select_strategy", "full"),
    ("generation_config.json", "suppress_tokens", [5]), ("generation_config.json", "sequence_bias", [[[5], 1.0]]),
    ("tokenizer_config.json", "add_bos_token", False), ("tokenizer_config.json", "add_eos_token", True),
    ("tokenizer_config.json", "sp_model_kwargs", {"alpha": 0.1}), ("added_tokens.json", "<x>", "512"),
]  # fmt: skip


@pytest.mark.parametrize("file, field, value", WRONG, ids=str)
def test_a_value_that_is_none_or_computes_something_else_is_one_line(file, field, value, folder, tmp_path):
    there = changed(folder, tmp_path / "hf", file, (field, value))
    with pytest.raises(ValueError) as error:
        open_source(there)
    assert str(error.value).startswith(f"{there / file}: {field.split('.')[0]}") and "\n" not in str(error.value)
    assert f"{field}={json.dumps(value)}" in str(error.value)


OTHERS = {  # files of transformers 4 and 5 and of the hub, as they are
    "transformers 4: Llama": public.LLAMA_4, "transformers 4: tower": public.VISION_4,
    "transformers 4: CLIP": public.CLIP_4, "transformers 4: LLaVA": public.LLAVA_4,
    "transformers 5: Llama": LlamaConfig().to_dict(), "transformers 5: tower": CLIPVisionConfig().to_dict(),
    "transformers 5: CLIP": CLIPConfig().to_dict(), "transformers 5: LLaVA": LlavaConfig().to_dict(),
    "transformers 5: LLaVA's difference": LlavaConfig().to_diff_dict(), "Vicuna": public.VICUNA,
    "liuhaotian": public.LIUHAOTIAN, "LLaVA's code of today": public.FINETUNED, "llava-hf": public.LLAVA_HF,
    "CLIP": public.CLIP,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_public_config_is_read(name):
    stated = configs.stated("config.json", json.loads(json.dumps(OTHERS[name])))
    big = {"Vicuna", "liuhaotian", "LLaVA's code of today", "llava-hf"}
    assert name not in big or stated.llama in (config.LLAVA_7B.llama, config.Llama(vocab=32064))
    assert name not in ("llava-hf", "CLIP") or stated.vision == config.LLAVA_7B.vision


FILES = [
    (public.GENERATION_4, hub.GENERATION), (public.VICUNA_GENERATION, hub.GENERATION),
    (GenerationConfig().to_dict(), hub.GENERATION), (public.OLD_PREPROCESSOR, hub.IMAGE_PROCESSOR),
    (public.PREPROCESSOR, hub.IMAGE_PROCESSOR), (public.TOKENIZER_431, vocabulary.TOKENIZER),
    (public.TOKENIZER_456, vocabulary.TOKENIZER), (public.TOKENIZER_5, vocabulary.TOKENIZER),
    (public.TOKEN, vocabulary.SPECIAL), (public.PEFT_06, peft_config.TABLE),
]  # fmt: skip


@pytest.mark.parametrize("values, table", FILES, ids=range(len(FILES)))
def test_what_other_programs_write_is_read(values, table):
    assert fields.flaws(json.loads(json.dumps(values)), table) == []


def test_what_transformers_and_peft_save_now_is_read(tmp_path):
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    files = {path.name: fields.load(path) for path in tmp_path.glob("*.json")}
    assert image_processor.image_mode_of(tmp_path, files) == "square"
    assert fields.flaws(files["generation_config.json"], hub.GENERATION) == []
    assert peft_config.read("x", files["adapter_config.json"])["r"] == 8


def test_a_base_of_the_rotary_embedding_that_two_fields_state_differently_is_refused():
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    assert configs.stated("c", public.VICUNA | {"rope_parameters": rope}).llama.theta == 5e5
    with pytest.raises(ValueError, match="c: rope_theta=10000.0, rope_parameters.rope_theta=500000.0 disagree"):
        configs.stated("c", public.LLAMA_4 | {"rope_parameters": rope})


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"type": "default"}, {}], ids=str)
def test_a_rope_scaling_that_scales_nothing_is_none(scaling):
    assert configs.stated("c", public.VICUNA | {"rope_scaling": scaling}).llama == config.LLAVA_7B.llama


def test_the_older_spelling_of_a_tower_overrides_the_other_as_in_transformers():
    values = public.CLIP | {"vision_config_dict": {"num_hidden_layers": 12}}
    assert configs.stated("c", values).vision.blocks == 12
    with pytest.raises(ValueError, match="c: vision_config.x=1; unknown"):
        configs.stated("c", public.CLIP | {"vision_config_dict": {"x": 1}})


def test_a_tower_that_was_trained_and_is_not_there_is_refused(state, tokenizer, tmp_path):
    for tower in (True, False):
        there = layouts.write_liuhaotian(tmp_path / str(tower), state, tower, tokenizer.model)
        values = json.loads((there / "config.json").read_text()) | {"unfreeze_mm_vision_tower": True}
        (there / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="unfreeze_mm_vision_tower=true: its image tower was trained, and is not"):
        open_source(tmp_path / "False")


@pytest.mark.parametrize("tower", ["openai/clip-vit-large-patch14-336", "./checkpoints/clip-vit-large-patch14-336"])
def test_another_tower_than_the_one_that_is_named_is_refused(tower):
    named = Weights("liu", "", {}, {}, (), tower=tower)
    towers = {n: Weights(f"clip{n}", "", {"vision/cls": Leaf.of(torch.ones(3))}, {}, (), config.Vision(image=n))
              for n in (224, 336)}  # fmt: skip
    assert model.merge([named, towers[336]]).vision.image == 336
    with pytest.raises(ValueError, match=f"liu: mm_vision_tower='{tower}' takes images of 336 pixels, clip224 those"):
        model.merge([named, towers[224]])


# The vocabulary: tokenizer.model, and what other files say of it.

ADDED = {
    "added_tokens.json": ("<loc>", 513),
    "tokenizer_config.json": ("added_tokens_decoder.513", {"content": "<loc>", "special": True}),
    "tokenizer.json": ("added_tokens", [{"id": 513, "content": "<loc>"}]),
}


@pytest.mark.parametrize("file", ADDED)
def test_a_token_that_another_file_adds_is_refused_by_its_name(file, folder, tmp_path):
    with pytest.raises(ValueError, match=rf"lacks tokens that other files add \({file}: '<loc>' \(513\)\); if the mo"):
        open_source(changed(folder, tmp_path / "hf", file, ADDED[file]))


@pytest.mark.parametrize(
    "file, field, value, said",
    [
        ("generation_config.json", "eos_token_id", [2, 7], r"eos_token_id=\[2, 7\]; tokenizer.model has 2"),
        ("generation_config.json", "bos_token_id", 5, "bos_token_id=5; tokenizer.model has 1"),
        ("config.json", "text_config.eos_token_id", 7, "eos_token_id=7; tokenizer.model has 2"),
        ("tokenizer_config.json", "eos_token", "<|im_end|>", "eos_token='<|im_end|>'; tokenizer.model has '</s>'"),
        ("special_tokens_map.json", "bos_token", {"content": "<b>"}, "bos_token='<b>'; tokenizer.model has '<s>'"),
        ("added_tokens.json", "</s>", 5, r"added_tokens.json: '</s>' \(5\)"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_another_bos_or_eos_than_the_tokenizer_s_is_refused(file, field, value, said, folder, tmp_path):
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        open_source(changed(folder, tmp_path / "hf", file, (field, value)))


def test_padding_of_the_vocabulary_is_set_apart_and_a_foreign_tokenizer_is_refused(state, tokenizer, tmp_path):
    wide = {n: torch.cat([t[:512], torch.ones_like(t[:8])]) if len(t) == 576 else t for n, t in state.items()}
    more = config.Llava(C.vision, config.Llama(**{**vars(C.llama), "vocab": 520}))
    folder = layouts.write_vicuna(tmp_path / "wide", wide, "bin", tokenizer.model, more)
    source = model.merge([open_source(folder)])
    assert source.llama == C.llama and source.leaves["llama/head"].shape == (512, 256)
    assert source.spare["llama/head"].read().tolist() == [[1.0] * 256] * 8
    with pytest.raises(
        ValueError, match="has 1000 tokens and the tokenizer 512, so that 488 could never be spelled; g"
    ):
        vocabulary.rows("x", tokenizer.model, 1000)
    with pytest.raises(ValueError, match="the tokenizer has 512 pieces, the decoder 500; give the decoder's own"):
        vocabulary.rows("x", tokenizer.model, 500)
