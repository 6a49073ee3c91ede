"""MindSpeed-MM's JSON files: nothing of them is dropped unsaid, and what they say becomes a config that loads."""

import copy
import json
import re
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
from mindspeed_files import data_json, evaluate_json, inference_json, model_json
from warm import recipe

from llava_fn.config import LLAVA_7B, LLAVA_13B, Llama, Vision
from llava_fn.data.options import Source
from llava_fn.launch import cli
from llava_fn.weights import mindspeed

LLAMA, VISION, PROJECTOR = "text_decoder", "image_encoder.vision_encoder", "image_encoder.vision_projector"
PIPELINE = "dataset_param.preprocess_parameters.train_pipeline"
BASIC = "dataset_param.basic_parameters"
GONE = object()


FILES = {"model": model_json, "data": data_json, "inference": inference_json, "evaluate": evaluate_json}


def steps(path):
    return [int(s) if s.isdigit() else s for s in re.findall(r"[^.\[\]]+", path)]


def put(values, path, value):
    """A copy with one field set, added or, with GONE, removed."""
    values = copy.deepcopy(values)
    *above, last = steps(path)
    inner = reduce(lambda v, key: v[key], above, values)
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return values


def fields(value, path=""):
    """(path, value) of all that is no object and no list of objects."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in fields(v, f"{path}.{k}" if path else k)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for i, v in enumerate(value) for leaf in fields(v, f"{path}[{i}]")]
    return [(path, value)]


@pytest.fixture
def move(tmp_path, monkeypatch):
    """Read these JSONs, each written to a file of its name."""
    monkeypatch.chdir(tmp_path)

    def move(**files):
        for name, values in files.items():
            Path(f"{name}.json").write_text(json.dumps(values))
        return mindspeed.read([Path(f"{name}.json") for name in files])

    return move


def refusal(move, **files):
    with pytest.raises(ValueError) as error:
        move(**files)
    return str(error.value)


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 or 3
    return {str: lambda: f"other/{value}", list: lambda: value[::-1], type(None): lambda: "other"}[type(value)]()


def fate(move, files, name, path, value):
    """What became of one field: used, checked (refused by its name), tied (others must follow) or ignored.

    Ignored only if nothing but its own line in the list changes.
    """
    before = move(**files)
    try:
        after = move(**files | {name: put(files[name], path, value)})
    except ValueError as error:
        return "checked" if re.search(rf"(?<![\w.]){re.escape(path)} ", str(error)) else "tied"
    gone, new = set(before.ignored) - set(after.ignored), set(after.ignored) - set(before.ignored)
    if replace(before, ignored=()) != replace(after, ignored=()):
        assert not gone and not new
        return "used"
    old = dict(fields(files[name]))[path]
    assert gone == {f"{name}.json: {path} = {old!r}"} and new == {f"{name}.json: {path} = {value!r}"}
    return "ignored"


NOWHERE = {
    "model": ("", f"{LLAMA}.", f"{VISION}.", f"{PROJECTOR}.", "image_encoder.", "text_decoder.inner."),
    "data": ("", "dataset_param.", f"{BASIC}.", f"{PIPELINE}.", f"{PIPELINE}.size."),
    "inference": ("", "tokenizer."), "evaluate": ("",),
}  # fmt: skip


@pytest.mark.parametrize("name, inside", [(name, x) for name, inner in NOWHERE.items() for x in inner])
def test_a_field_from_nowhere_is_refused_by_file_field_and_value(move, name, inside):
    values = FILES[name]()
    if "inner" in inside:
        values = put(values, inside.strip("."), {})
    assert move(**{name: put(values, f"{inside}a_field_from_nowhere", None)})
    said = refusal(move, **{name: put(values, f"{inside}a_field_from_nowhere", 7)})
    assert said.startswith("1 fields of MindSpeed-MM cannot be moved:\n")
    assert f"\n  {name}.json: {inside}a_field_from_nowhere=7; unknown; remove the field if" in said


SIZES = {  # the fields that have to change together
    f"{LLAMA}.hidden_size": {f"{PROJECTOR}.hidden_size": 8192, f"{PROJECTOR}.ffn_hidden_size": 8192},
    f"{VISION}.hidden_size": {f"{PROJECTOR}.input_size": 2048, f"{VISION}.kv_channels": 128},
    f"{VISION}.num_attention_heads": {f"{VISION}.num_query_groups": 32, f"{VISION}.kv_channels": 32},
}
WORDS = "dataset_param.tokenizer_config"
MODEL_USED = {f"{LLAMA}.{f}" for f in "num_layers ffn_hidden_size language_vocab_size num_attention_heads".split()}
MODEL_USED |= {f"{LLAMA}.num_query_groups"}
MODEL_USED |= {f"{VISION}.{f}" for f in ("num_layers", "ffn_hidden_size", "patch_size", "image_size")}
MODEL_USED |= {f"{part}.ckpt_path" for part in (LLAMA, VISION, PROJECTOR)}
TRAINING = {f"{LLAMA}.{f}" for f in ("freeze", "params_dtype", "recompute_granularity")}
TRAINING |= {f"{VISION}.freeze", f"{PROJECTOR}.freeze"}
MODEL_IGNORED = {f"{part}.{f}" for part in (LLAMA, VISION, PROJECTOR) for f in ("bf16", "fp16", "params_dtype")}
MODEL_IGNORED |= {f"{part}.bias_activation_fusion" for part in (LLAMA, VISION, PROJECTOR)}
MODEL_IGNORED |= {f"{part}.bias_dropout_fusion" for part in (LLAMA, VISION)}
MODEL_IGNORED |= {f"{part}.{f}" for part in (LLAMA, VISION) for f in ("apply_rope_fusion", "attention_softmax_in_fp32")}
MODEL_IGNORED |= {f"{LLAMA}.{f}" for f in "recompute_method recompute_num_layers persist_layer_norm".split()}
MODEL_IGNORED |= {f"{LLAMA}.{f}" for f in "max_position_embeddings language_max_sequence_length".split()}
MODEL_IGNORED |= {f"{LLAMA}.{f}" for f in "deallocate_pipeline_outputs is_encoder_decoder".split()}
MODEL_IGNORED |= {f"{LLAMA}.apply_query_key_layer_scaling", f"{VISION}.device", f"{PROJECTOR}.num_attention_heads"}
RUN_IGNORED = {f"generation_config.{f}" for f in "max_new_tokens temperature do_sample bad_words_ids".split()}
RUN_IGNORED |= {"tokenizer.hub_backend", "tokenizer.autotokenizer_name", "tokenizer.use_fast", "dtype", "device"}
RUN_IGNORED |= {"pipeline_class", "image_processer_path", "image_path", "prompts", "dataset_path"}
RUN_IGNORED |= {"evaluation_dataset", "evaluation_model", "result_output_path"}
DATA_IGNORED = {f"dataloader_param.{f}" for f in "dataloader_mode shuffle drop_last pin_memory sampler_type".split()}
DATA_IGNORED |= {f"{WORDS}.{f}" for f in "hub_backend autotokenizer_name cache_dir padding_side use_fast".split()}
DATA_IGNORED |= {"dataloader_param.collate_param.pad_token_id", "dataset_param.use_text_processer"}
DATA_IGNORED |= {f"{PIPELINE}.pad2square"}


@pytest.mark.parametrize(
    ("given", "used", "tied", "ignored"),
    [
        ("model", MODEL_USED, {*SIZES}, MODEL_IGNORED | TRAINING),
        ("inference", MODEL_USED | {"tokenizer.from_pretrained"}, {*SIZES}, MODEL_IGNORED | TRAINING | RUN_IGNORED),
        ("evaluate", MODEL_USED | {"tokenizer.from_pretrained"}, {*SIZES}, MODEL_IGNORED | TRAINING | RUN_IGNORED),
        (
            "model data",
            MODEL_USED - {f"{VISION}.image_size"} | TRAINING - {f"{VISION}.freeze", f"{PROJECTOR}.freeze"},
            {*SIZES, f"{VISION}.image_size"},
            MODEL_IGNORED - TRAINING,
        ),
        ("data", {f"{BASIC}.data_path", f"{BASIC}.data_folder", f"{WORDS}.from_pretrained"}, set(), DATA_IGNORED),
    ],
)
def test_each_field_is_used_or_checked_or_listed(move, given, used, tied, ignored):
    files = {name: FILES[name]() for name in given.split()}
    name = given.split()[0]
    values = {path: other(value) for path, value in fields(files[name])}
    allowed = {f"{LLAMA}.params_dtype": "fp32", f"{LLAMA}.recompute_granularity": "selective"}
    allowed |= {f"{LLAMA}.num_query_groups": 16, f"{BASIC}.data_path": "other.json"}
    values |= {path: value for path, value in allowed.items() if path in values}
    fates = {path: fate(move, files, name, path, value) for path, value in values.items()}
    for kind, expected in (("used", used), ("tied", tied), ("ignored", ignored)):
        assert {path for path, fate in fates.items() if fate == kind} == expected & fates.keys(), kind
    assert used | tied <= fates.keys()


@pytest.mark.parametrize("path", SIZES)
def test_sizes_that_follow_from_one_another_are_used_only_if_they_agree(move, path):
    values = model_json()
    alone = put(values, path, 2 * dict(fields(values))[path])
    agreed = reduce(lambda v, item: put(v, *item), SIZES[path].items(), alone)
    assert move(model=agreed).model != move(model=values).model
    said = refusal(move, model=alone)
    assert all(f"model.json: {name} is " in said and f"wanted: {size}" in said for name, size in SIZES[path].items())


def test_the_published_model_is_llava_7b(move):
    moved = move(model=model_json())
    assert moved.model == LLAVA_7B
    assert moved.weights == (Path("w/vicuna.pt"), Path("w/clip.pt"))
    assert (moved.tokenizer, moved.pretrain, moved.image_mode) == (None, None, None)
    assert move(inference=inference_json()).weights == (Path("w/vicuna.pt"), Path("w/clip.pt"), Path("w/mlp.pt"))


def test_each_size_goes_where_it_belongs(move):
    sizes = {f"{LLAMA}.num_layers": 4, f"{LLAMA}.hidden_size": 96, f"{LLAMA}.num_attention_heads": 6}
    sizes |= {f"{LLAMA}.num_query_groups": 3, f"{LLAMA}.ffn_hidden_size": 200, f"{LLAMA}.language_vocab_size": 512}
    sizes |= {f"{VISION}.num_layers": 5, f"{VISION}.hidden_size": 60, f"{VISION}.num_attention_heads": 5}
    sizes |= {f"{VISION}.num_query_groups": 5, f"{VISION}.kv_channels": 12, f"{VISION}.ffn_hidden_size": 70}
    sizes |= {f"{VISION}.patch_size": 8, f"{VISION}.image_size": 32, f"{VISION}.layernorm_epsilon": 1e-3}
    sizes |= {f"{PROJECTOR}.input_size": 60, f"{PROJECTOR}.hidden_size": 96, f"{PROJECTOR}.ffn_hidden_size": 96}
    values = reduce(lambda v, item: put(v, *item), sizes.items(), model_json())
    values = put(values, f"{LLAMA}.layernorm_epsilon", 1e-4)
    model = move(model=values).model
    assert model.vision == Vision(image=32, patch=8, width=60, blocks=5, heads=5, ffn=70, eps=1e-3)
    assert model.llama == Llama(vocab=512, width=96, blocks=4, heads=6, kv_heads=3, ffn=200, eps=1e-4)


def test_a_13b_is_a_13b(move):
    sizes = {"hidden_size": 5120, "num_layers": 40, "num_attention_heads": 40, "num_query_groups": 40}
    values = model_json()
    values["text_decoder"] |= sizes | {"ffn_hidden_size": 13824}
    values["image_encoder"]["vision_projector"] |= {"hidden_size": 5120, "ffn_hidden_size": 5120}
    assert move(model=values).model == LLAVA_13B


def test_a_tower_of_23_layers_is_the_one_of_24_whose_last_is_not_run(move):
    later = put(put(model_json(), f"{VISION}.num_layers", 23), f"{PROJECTOR}.num_attention_heads", GONE)
    assert move(model=model_json(), later=later).model == LLAVA_7B
    assert move(later=later).model.vision.used == 23


def test_missing_query_groups_are_one_for_each_head(move):
    for value in (GONE, None):
        assert move(model=put(model_json(), f"{LLAMA}.num_query_groups", value)).model.llama.kv_heads == 32


WRONG = [  # a field that the published file does not have, or whose every value but one is refused
    (f"{LLAMA}.gated_linear_unit", False, True),
    (f"{LLAMA}.normalization", "LayerNorm", "RMSNorm"),
    (f"{LLAMA}.activation_func", "gelu", "silu"),
    (f"{LLAMA}.add_bias_linear", True, False),
    (f"{LLAMA}.add_bias_linear", 0, False),
    (f"{LLAMA}.add_qkv_bias", True, False),
    (f"{LLAMA}.lm_position_embedding_type", "learned_absolute", "rope"),
    (f"{LLAMA}.rotary_base", 500000, 10000.0),
    (f"{LLAMA}.rotary_interleaved", True, False),
    (f"{LLAMA}.share_embeddings_and_output_weights", True, False),
    (f"{LLAMA}.qk_layernorm", True, False),
    (f"{LLAMA}.num_moe_experts", 8, None),
    (f"{LLAMA}.apply_residual_connection_post_layernorm", True, False),
    (f"{LLAMA}.layernorm_zero_centered_gamma", True, False),
    (f"{LLAMA}.hidden_dropout", 0.1, 0.0),
    (f"{LLAMA}.kv_channels", 64, 128),
    (f"{VISION}.activation_func", "gelu", "quick_gelu"),
    (f"{VISION}.add_qkv_bias", False, True),
    (f"{VISION}.qk_layernorm", True, False),
    (f"{VISION}.num_query_groups", 4, 16),
    (f"{VISION}.kv_channels", 32, 64),
    (f"{VISION}.class_token_len", 8, 1),
    (f"{VISION}.recompute_granularity", "full", None),
    (f"{PROJECTOR}.num_layers", 3, 2),
    (f"{PROJECTOR}.activation_func", "silu", "gelu"),
    (f"{PROJECTOR}.input_size", 1152, 1024),
    (f"{PROJECTOR}.hidden_size", 5120, 4096),
    (f"{PROJECTOR}.ffn_hidden_size", 11008, 4096),
    ("text_encoder", {"model_id": "T5"}, None),
    ("model_id", "internvl", "llava"),
]


@pytest.mark.parametrize(("path", "value", "wanted"), WRONG)
def test_a_value_that_llava_does_not_compute_with_is_refused(move, path, value, wanted):
    said = refusal(move, model=put(model_json(), path, value))
    assert said.startswith("1 fields") and f"model.json: {path} is " in said and said.endswith(f"wanted: {wanted!r}")
    if not isinstance(value, dict):
        assert f"is {value!r};" in said


def test_one_error_lists_every_field_of_every_file(move):
    data = put(put(data_json(), f"{PIPELINE}.resample", 2), f"{PIPELINE}.image_mean", [0.5, 0.5, 0.5])
    model = put(model_json(), f"{VISION}.num_layers", GONE)
    for path, value, _ in (WRONG[0], WRONG[1]):
        model = put(model, path, value)
    said = refusal(move, model=model, data=put(data, f"{BASIC}.data_path", "/<your_path>/d.json")).splitlines()[1:]
    assert sorted(line.split(" is ")[0].strip() for line in said) == sorted(
        [f"data.json: {PIPELINE}.resample", f"data.json: {PIPELINE}.image_mean", f"data.json: {BASIC}.data_path"]
        + [f"model.json: {path}" for path in (WRONG[0][0], WRONG[1][0], f"{VISION}.num_layers")]
    )


DEFAULTS = [  # fields whose absence means something else to Megatron than LLaVA-1.5
    (f"{LLAMA}.gated_linear_unit", False),
    (f"{LLAMA}.normalization", "LayerNorm"),
    (f"{LLAMA}.activation_func", "gelu"),
    (f"{LLAMA}.add_bias_linear", True),
    (f"{LLAMA}.hidden_dropout", 0.1),
    (f"{LLAMA}.attention_dropout", 0.1),
    (f"{VISION}.hidden_dropout", 0.1),
    (f"{VISION}.activation_func", "gelu"),
    (f"{VISION}.add_qkv_bias", False),
    (f"{PROJECTOR}.ffn_hidden_size", 16384),
]
OPTIONAL = [f"{LLAMA}.layernorm_zero_centered_gamma", f"{VISION}.kv_channels", f"{VISION}.normalization"]
OPTIONAL += [f"{VISION}.post_layer_norm", f"{PROJECTOR}.add_bias_linear", f"{PROJECTOR}.activation_func"]
OPTIONAL += [f"{PROJECTOR}.ckpt_path", f"{LLAMA}.ckpt_path", "text_encoder", f"{VISION}.num_query_groups"]


@pytest.mark.parametrize(("path", "meaning"), DEFAULTS)
def test_a_missing_field_is_what_megatron_takes_for_it(move, path, meaning):
    assert f"model.json: {path} is missing, which means {meaning!r};" in refusal(
        move, model=put(model_json(), path, GONE)
    )


@pytest.mark.parametrize("path", OPTIONAL)
def test_a_field_whose_default_is_llavas_may_be_missing(move, path):
    assert move(model=put(model_json(), path, GONE)).model == LLAVA_7B


NEEDED = [f"{LLAMA}.{f}" for f in "num_layers hidden_size num_attention_heads ffn_hidden_size freeze".split()]
NEEDED += [f"{LLAMA}.{f}" for f in ("language_vocab_size", "lm_position_embedding_type", "params_dtype")]
NEEDED += [f"{VISION}.{f}" for f in "num_layers hidden_size num_attention_heads ffn_hidden_size patch_size".split()]
NEEDED += [f"{VISION}.{f}" for f in ("image_size", "add_class_token", "class_token_len", "freeze", "model_id")]
NEEDED += [f"{PROJECTOR}.{f}" for f in ("input_size", "hidden_size", "model_id", "freeze")] + ["model_id"]
NEEDED_DATA = [f"{BASIC}.data_path", f"{BASIC}.data_folder", "dataset_param.tokenizer_config.from_pretrained"]
NEEDED_DATA += ["dataset_param.template_name", "dataset_param.dataset_type", f"{PIPELINE}.image_mean"]
NEEDED_DATA += [f"{PIPELINE}.crop_size.height", f"{PIPELINE}.size.shortest_edge"]
NEEDED_DATA += ["dataloader_param.collate_param.model_name"]


@pytest.mark.parametrize(
    ("name", "path"), [("model", path) for path in NEEDED] + [("data", path) for path in NEEDED_DATA]
)
def test_a_missing_required_field_is_named_with_its_file(move, name, path):
    files = {"model": model_json(), "data": data_json()}
    said = refusal(move, **files | {name: put(files[name], path, GONE)})
    assert said.startswith("1 fields") and f"{name}.json: {path} is missing;" in said


@pytest.mark.parametrize("value", ["32", 32.0, 0, -1, True, None, [32]])
def test_a_size_that_is_no_whole_number_is_refused(move, value):
    said = refusal(move, model=put(model_json(), f"{LLAMA}.num_layers", value))
    assert said.endswith(f"model.json: {LLAMA}.num_layers is {value!r}; wanted: a whole number above 0")


@pytest.mark.parametrize("value", [0.0, -1e-5, "1e-5", True, None])
def test_an_epsilon_that_is_no_number_above_0_is_refused(move, value):
    said = refusal(move, model=put(model_json(), f"{LLAMA}.layernorm_epsilon", value))
    assert said.endswith(f"model.json: {LLAMA}.layernorm_epsilon is {value!r}; wanted: a number above 0")


@pytest.mark.parametrize("field", ["freeze", "recompute_granularity"])
def test_a_setting_of_training_that_means_nothing_is_refused(move, field):
    said = refusal(move, model=put(model_json(), f"{LLAMA}.{field}", "some"), data=data_json())
    assert said.startswith("1 fields") and f"model.json: {LLAMA}.{field} is 'some'; wanted: " in said


def test_sizes_that_do_not_divide_are_refused_with_the_file(move):
    assert "model.json: llama.width=4096" in refusal(move, model=put(model_json(), f"{LLAMA}.num_attention_heads", 24))


def load(moved, base=Path("bases/a")):
    """The training config of what was moved, after a way through a file."""
    Path("config.json").write_text(json.dumps(mindspeed.pretrain_config(moved, base)))
    return cli.read(recipe("pretrain").Pretrain, Path("config.json"))


def test_the_training_config_loads_and_says_what_the_files_say(move):
    c = load(move(model=model_json(), data=data_json()))
    assert c.data.sources == (Source(Path("d/records.json"), Path("d/images")),)
    assert (c.data.template, c.data.image_mode) == ("plain", "pad")
    assert (c.train, c.base, c.dtype, c.recompute) == ("projector", Path("bases/a"), "bfloat16", "on")
    assert (c.model, c.tokenizer) == (None, None)  # the base brings both


def test_data_alone_gives_a_training_of_the_projector(move):
    moved = move(data=data_json())
    assert (moved.model, moved.weights, moved.tokenizer) == (None, (), Path("hf/vicuna"))
    assert load(moved).train == "projector"


def test_what_no_file_says_keeps_our_defaults(move):
    moved = move(data=data_json())
    assert moved.pretrain.keys() == {"run_dir", "data", "optim", "train"}
    assert moved.pretrain["data"].keys() == {"sources", "template", "image_mode"} and not moved.pretrain["optim"]


def test_no_data_json_gives_no_training_config(move):
    with pytest.raises(ValueError, match="no data.json"):
        mindspeed.pretrain_config(move(model=model_json()), Path("base"))


@pytest.mark.parametrize("pad", [True, False])
def test_images_are_padded_whatever_pad2square_says(move, pad):
    moved = move(data=put(data_json(), f"{PIPELINE}.pad2square", pad))
    assert moved.image_mode == moved.pretrain["data"]["image_mode"] == "pad"
    assert f"data.json: {PIPELINE}.pad2square = {pad}" in moved.ignored
    assert move(inference=inference_json()).image_mode == move(evaluate=evaluate_json()).image_mode == "pad"


@pytest.mark.parametrize(
    ("llama", "vision", "projector", "train"),
    [(True, True, False, "projector"), (False, True, False, "projector+llama"), (False, False, False, "all")],
)
def test_what_is_not_frozen_is_trained(move, llama, vision, projector, train):
    values = model_json()
    for path, value in ((LLAMA, llama), (VISION, vision), (PROJECTOR, projector)):
        values = put(values, f"{path}.freeze", value)
    assert load(move(model=values, data=data_json())).train == train


def test_a_training_that_there_is_not_is_refused(move):
    said = refusal(move, model=put(model_json(), f"{VISION}.freeze", False), data=data_json())
    assert f"{VISION}.freeze = False" in said and "projector+llama" in said
    said = refusal(move, model=model_json("fp16"), data=data_json())
    assert f"model.json: {LLAMA}.params_dtype is 'fp16'; wanted: one of 'bf16'" in said
    assert move(model=model_json("fp16")).model == LLAVA_7B  # without a training its type is of no interest
    assert load(move(model=model_json("fp32"), data=data_json())).dtype == "float32"


@pytest.mark.parametrize("inner", [True, False])
def test_several_data_sets_become_sources(move, inner):
    rows = [{"data_path": f"{i}.jsonl", "data_folder": f"i{i}", "repeat_time": i} for i in range(3)]
    rows.append({"data_path": "a.json", "data_folder": "b", "note": None})
    values = put(data_json(), BASIC, {"data_path": rows} if inner else rows)
    moved = move(data=values)
    sources = [Source(Path(f"{i}.jsonl"), Path(f"i{i}"), i) for i in range(3)] + [Source(Path("a.json"), Path("b"))]
    assert load(moved).data.sources == tuple(sources)
    where = f"{BASIC}.data_path[3]" if inner else f"{BASIC}[3]"
    assert [line for line in moved.ignored if BASIC in line] == [f"data.json: {where}.note = None"]
    rows[3]["note"] = 7
    assert f"data.json: {where}.note=7; unknown" in refusal(move, data=values)


@pytest.mark.parametrize("times", [0.5, 2.5, -1, True, "2", None])
def test_a_repeat_time_without_an_equal_is_refused(move, times):
    rows = [{"data_path": "a.json", "data_folder": "b", "repeat_time": times}]
    said = refusal(move, data=put(data_json(), BASIC, rows))
    assert f"data.json: {BASIC}[0].repeat_time is {times!r}; wanted: a whole number" in said


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{BASIC}.data_path", "d/records.csv"),
        (f"{BASIC}.data_path", ["a.json", "b.json"]),
        (f"{BASIC}.data_path", ""),
        (f"{BASIC}.data_folder", 7),
        (f"{BASIC}.data_storage_mode", "combine"),
        ("dataset_param.template_name", "llava-v1"),
        ("dataset_param.template_name", ["llava-plain"]),
        ("dataset_param.dataset_type", "t2v"),
        ("dataset_param.preprocess_parameters.image_processer_type", "image2video"),
        ("dataset_param.mm_use_im_start_end", True),
        (f"{PIPELINE}.crop_size.height", 224),
        (f"{PIPELINE}.size.shortest_edge", 224),
        (f"{PIPELINE}.do_center_crop", False),
        (f"{PIPELINE}.rescale_factor", 0.004),
    ],
)
def test_data_that_llava_does_not_read_so_is_refused(move, path, value):
    said = refusal(move, data=put(data_json(), path, value))
    assert said.startswith("1 fields") and f"data.json: {path} is {value!r}; wanted: " in said


def test_the_crop_is_the_image_that_the_given_model_sees(move):
    model = put(put(model_json(), f"{VISION}.image_size", 224), "text_encoder", GONE)
    assert "crop_size.height is 336; wanted: 224" in refusal(move, model=model, data=data_json())
    data = put(data_json(), f"{PIPELINE}.crop_size", {"height": 224, "width": 224})
    assert move(model=model, data=put(data, f"{PIPELINE}.size.shortest_edge", 224)).model.vision.image == 224


def test_the_first_versions_of_the_example_are_read_too(move):
    data = put(data_json(), "dataset_param.dataset_type", "image")
    data = put(data, "dataset_param.preprocess_parameters.image_processer_type", "image2pixel")
    data = put(put(data, "dataloader_param.shuffle", False), "dataloader_param.batch_size", 8)
    model = put(model_json(), f"{LLAMA}.max_position_embeddings", GONE)
    moved = move(model=model, data=data)
    assert moved.model == LLAVA_7B and "data.json: dataloader_param.batch_size = 8" in moved.ignored


@pytest.mark.parametrize(
    "text",
    ["/<your_vicuna_weights_path>/v.pt", "{dir_to_raw_model}/vicuna", "/your_llava_data_path/L/r.json"],
)
def test_a_path_that_waits_to_be_edited_is_named(move, text):
    places = {"model": f"{LLAMA}.ckpt_path", "data": f"{BASIC}.data_folder", "inference": "tokenizer.from_pretrained"}
    for name, path in places.items():
        said = refusal(move, **{name: put(FILES[name](), path, text)})
        assert said.startswith("1 fields") and f"{name}.json: {path} is {text!r}" in said and "edit it first" in said


def test_files_that_agree_are_read_together(move):
    both = move(model=model_json(), data=data_json(), inference=inference_json())
    assert both.model == LLAVA_7B and both.tokenizer == Path("hf/vicuna")
    assert both.weights == (Path("w/vicuna.pt"), Path("w/clip.pt"), Path("w/mlp.pt"))
    assert load(both).dtype == "bfloat16"  # inference in float16 says nothing of training


@pytest.mark.parametrize(
    ("a", "b", "path", "value", "said"),
    [
        ("model", "inference", f"{LLAMA}.num_layers", 40, "model.llama.blocks: 32 -> 40"),
        ("model", "inference", f"{VISION}.ckpt_path", "x/clip.pt", "ckpt_path: w/clip.pt -> x/clip.pt"),
        ("data", "data2", f"{BASIC}.data_path", "x/records.json", "x/records.json"),
        ("inference", "evaluate", "tokenizer.from_pretrained", "hf/llava", "from_pretrained: hf/vicuna -> hf/llava"),
    ],
)
def test_files_that_contradict_each_other_are_both_named(move, a, b, path, value, said):
    files = FILES | {"data2": data_json}
    error = refusal(move, **{a: files[a](), b: put(files[b](), path, value)})
    assert f"{a}.json and {b}.json contradict each other" in error and said in error


def test_broken_json_is_refused_with_line_and_column(tmp_path):
    path = tmp_path / "evaluate.json"
    path.write_text('{\n  "text_decoder": {"ckpt_path": "a"}\n    "image_encoder": {}\n}')  # no comma after line 2
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3, column 5: Expecting ',' delimiter")):
        mindspeed.read([path])


def test_a_field_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "model.json"
    path.write_text('{"text_decoder": {"num_layers": 32, "num_layers": 40}}')
    with pytest.raises(ValueError, match=re.escape(f"{path}: one object has num_layers twice")):
        mindspeed.read([path])


@pytest.mark.parametrize("content", [b"[]", b"{}", b"3", b'{"text_config": {}}', b"\xff\xfe{}"])
def test_another_json_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        mindspeed.read([path])


def test_a_config_is_told_from_its_content():
    assert all(mindspeed.is_config(make()) for make in FILES.values())
    assert mindspeed.is_config({"image_encoder": {}})  # of which reading then says what is missing
    others = [
        {"model_type": "llava", "text_config": {}, "vision_config": {}},
        {"image_encoder": ["transformers", "CLIP"]},
    ]
    assert not any(
        mindspeed.is_config(v) for v in [*others, {}, [], None, "text_decoder", {"profile": {"enable": False}}]
    )
