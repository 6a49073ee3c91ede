"""The JSON files of MindSpeed-MM's LLaVA-1.5 example in our terms: model.json, data.json, and those of its inference
and its evaluation.

A field of a file is either used, or checked for the only value that is LLaVA-1.5's, or listed as ignored, or refused
because nothing here knows it. MindSpeed-MM gives missing fields Megatron's defaults, which often are not LLaVA's: a
missing field is checked as if it had that default.
Sources: MindSpeed-MM vl_model.py, clip_vit_model.py, multimodal_projector.py, multimodal_dataset.py, and
Megatron-LM transformer_config.py, both of core_r0.8.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_fn import fields
from llava_fn.config import Llama, Llava, Vision, differences, plain
from llava_fn.data.options import Source

MODEL, DATA = ("text_decoder", "image_encoder"), ("dataset_param",)  # objects by which a file is recognised
LLAMA, VISION, PROJECTOR = "text_decoder", "image_encoder.vision_encoder", "image_encoder.vision_projector"
PARTS = (LLAMA, VISION, PROJECTOR)
BASIC, PREPROCESS = "dataset_param.basic_parameters", "dataset_param.preprocess_parameters"
PIPELINE = f"{PREPROCESS}.train_pipeline"
REQUIRED = "nothing"  # in place of a default that MindSpeed-MM does not have

# field, its value in LLaVA-1.5, its default
LAYER_CHECKS = (
    ("attention_dropout", 0.0, 0.1),
    ("hidden_dropout", 0.0, 0.1),
    ("layernorm_zero_centered_gamma", False, False),
    ("apply_residual_connection_post_layernorm", False, False),
    ("qk_layernorm", False, False),
    ("num_moe_experts", None, None),
)
LLAMA_CHECKS = LAYER_CHECKS + (
    ("normalization", "RMSNorm", "LayerNorm"),
    ("activation_func", "silu", "gelu"),
    ("gated_linear_unit", True, False),
    ("add_bias_linear", False, True),
    ("add_qkv_bias", False, False),
    ("lm_position_embedding_type", "rope", REQUIRED),
    ("rotary_base", Llama.theta, Llama.theta),
    ("rotary_interleaved", False, False),
    ("share_embeddings_and_output_weights", False, False),
)
VISION_CHECKS = LAYER_CHECKS + (
    ("model_id", "clip", REQUIRED),
    ("normalization", "LayerNorm", "LayerNorm"),
    ("activation_func", "quick_gelu", "gelu"),
    ("gated_linear_unit", False, False),
    ("add_bias_linear", True, True),
    ("add_qkv_bias", True, False),
    ("post_layer_norm", False, False),
    ("add_class_token", True, REQUIRED),
    ("class_token_len", 1, REQUIRED),
    ("recompute_granularity", None, None),  # if set, MindSpeed-MM reads another hidden state
)
PROJECTOR_CHECKS = (
    ("model_id", "mlp", REQUIRED),
    ("num_layers", 2, 2),
    ("activation_func", "gelu", "gelu"),
    ("gated_linear_unit", False, False),
    ("add_bias_linear", True, True),
)
MODEL_CHECKS = (("model_id", "llava", REQUIRED), ("text_encoder", None, None), ("video_encoder", None, None)) + tuple(
    (f"{part}.{name}", wanted, default)
    for part, checks in ((LLAMA, LLAMA_CHECKS), (VISION, VISION_CHECKS), (PROJECTOR, PROJECTOR_CHECKS))
    for name, wanted, default in checks
)
DATA_CHECKS = (
    (f"{PREPROCESS}.image_reader_type", "CLIPImageProcessor", REQUIRED),
    (f"{PREPROCESS}.image_processer_type", "image2pixel", "image2pixel"),  # of the example's first versions
    *(
        (f"{PIPELINE}.do_{step}", True, True)
        for step in ("center_crop", "convert_rgb", "normalize", "rescale", "resize")
    ),
    (f"{PIPELINE}.image_mean", list(Vision.mean), REQUIRED),
    (f"{PIPELINE}.image_std", list(Vision.std), REQUIRED),
    (f"{PIPELINE}.resample", 3, 3),  # Pillow's number of the bicubic filter
    (f"{PIPELINE}.rescale_factor", 1 / 255, 1 / 255),
    ("dataset_param.mm_use_im_start_end", False, True),
    ("dataloader_param.collate_param.model_name", "llava", REQUIRED),
)

_LAYER = {"width": "hidden_size", "blocks": "num_layers", "heads": "num_attention_heads", "ffn": "ffn_hidden_size"}
SIZES = (  # of each part: our name of a size -> MindSpeed-MM's
    (VISION, _LAYER | {"image": "image_size", "patch": "patch_size"}),
    (LLAMA, _LAYER | {"vocab": "language_vocab_size"}),
)

TRAINS = {  # which of PARTS are frozen -> our name of the training stage
    (True, True, False): "projector",
    (False, True, False): "projector+llama",
    (False, False, False): "all",
}
TEMPLATES = {"llava-plain": "plain"}  # the only template that MindSpeed-MM supports with images
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "float32": "float32"}
RECOMPUTE = {"full": "on", "selective": "off", None: "off"}  # selective: attention alone, which stores no scores here

_SPEED = (  # how Megatron runs a layer: numbers differ by rounding alone
    "bf16 fp16 fp32 params_dtype bias_activation_fusion bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion "
    "apply_rope_fusion masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm attention_softmax_in_fp32 "
    "apply_query_key_layer_scaling fp32_residual_connection gradient_accumulation_fusion recompute_granularity "
    "recompute_method recompute_num_layers distribute_saved_activations deallocate_pipeline_outputs cpu_offloading "
    "sequence_parallel use_flash_attn use_fused_rotary_pos_emb freeze device is_encoder_decoder init_method_std "
    "max_position_embeddings language_max_sequence_length num_attention_heads"
)
_WORDS = "hub_backend autotokenizer_name cache_dir padding_side use_fast from_pretrained"
IGNORED: fields.Table = {
    **fields.free(" ".join(f"{part}.{name}" for part in PARTS for name in _SPEED.split())),
    **fields.free(
        " ".join(f"{at}.{x}" for at in ("tokenizer", "dataset_param.tokenizer_config") for x in _WORDS.split())
    ),
    **fields.free(f"dataset_param.use_text_processer {PIPELINE}.pad2square"),
    **fields.free(  # of its inference and evaluation
        "pipeline_class dtype device image_processer_path image_path prompts dataset_path evaluation_dataset "
        "evaluation_model result_output_path"
    ),
}
FOLLOWING = (  # fields that follow from the sizes
    f"{VISION}.num_query_groups", f"{VISION}.kv_channels", f"{LLAMA}.kv_channels", f"{PROJECTOR}.input_size",
    f"{PROJECTOR}.hidden_size", f"{PROJECTOR}.ffn_hidden_size",
)  # fmt: skip
OPTIONS = ("generation_config.", "dataloader_param.")  # how to sample, and how to read data: options here

PLACEHOLDER = re.compile(r"<[^/]*>|\{[^/]*\}|(^|/)your_\w+_path(/|$)")


@dataclass(frozen=True)
class Translation:
    """The content of MindSpeed-MM's JSON files in our terms."""

    model: Llava | None  # None without a model.json
    weights: tuple[Path, ...]  # the ckpt_path of decoder, image tower and projector, without nulls
    tokenizer: Path | None  # the folder or file in from_pretrained
    pretrain: dict | None  # fields for a config.json of recipes/pretrain.py; None without a data.json
    image_mode: str | None
    ignored: tuple[str, ...]  # one line for each field that has no meaning here


@dataclass
class _File:
    """A file and the errors found in it. leaves: path, as in "text_decoder.num_layers" -> value of the field.

    The methods that return None for a wrong field also add it to `wrong`.
    """

    name: str
    leaves: dict[str, Any]
    taken: set[str] = field(default_factory=set)  # leaves that are used or checked
    wrong: list[str] = field(default_factory=list)

    def inside(self, name: str) -> dict[str, Any]:
        """The leaves at the path `name` or below it."""
        return {k: v for k, v in self.leaves.items() if k == name or k.startswith((f"{name}.", f"{name}["))}

    def take(self, name: str, default: Any = None) -> Any:
        """The field's value, or the leaves below the field."""
        leaves = self.inside(name)
        self.taken.update(leaves)
        return leaves.get(name, leaves) if leaves else default

    def refuse(self, name: str, why: str) -> None:
        """Add the field to `wrong`."""
        state = f"is {self.take(name)!r}" if self.inside(name) else "is missing"
        self.wrong.append(f"{self.name}: {name} {state}{why}")

    def refuse_unknown(self) -> None:
        """Refuse each field that was neither taken nor is known to mean nothing here."""
        left = {k: v for k, v in self.leaves.items() if k not in self.taken and not k.startswith(OPTIONS) and v != {}}
        self.wrong += [f"{self.name}: {flaw}" for flaw in fields.flaws(left, IGNORED)]

    def check(self, name: str, wanted: Any, default: Any) -> None:
        """Refuse the field unless its value, or the default of a missing field, is the wanted one."""
        value = self.take(name, default)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            meaning = "" if self.inside(name) or default is REQUIRED else f", which means {default!r}"
            self.refuse(name, f"{meaning}; wanted: {wanted!r}")

    def choice(self, name: str, choices: Mapping[Any, Any]) -> Any:
        """Our value for the field's; None if there is none."""
        value = self.take(name)
        if value is None or isinstance(value, str):
            if value in choices:
                return choices[value]
        self.refuse(name, f"; wanted: one of {', '.join(map(repr, choices))}")
        return None

    def size(self, name: str, default: int | None = None) -> int | None:
        """The field as a whole number above 0, or None."""
        value = default if self.take(name) is None else self.take(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.refuse(name, "; wanted: a whole number above 0")
        return None

    def path(self, name: str) -> Path | None:
        """The field as a path; None if it is no path or still a placeholder."""
        value = self.take(name)
        if isinstance(value, str) and value and not PLACEHOLDER.search(value):
            return Path(value)
        edit = ", a placeholder for a path; edit it first"
        self.refuse(name, edit if isinstance(value, str) and value else "; wanted: a path")
        return None

    def optional_path(self, name: str) -> Path | None:
        """As `path`, but the field may be null or missing."""
        return None if self.take(name) is None else self.path(name)

    def items(self, name: str) -> list[str]:
        """The paths of the items of a list of objects, or [name] for any other field."""
        matches = (re.match(re.escape(name) + r"\[\d+\]", leaf) for leaf in self.leaves)
        return list(dict.fromkeys(m.group() for m in matches if m)) or [name]


def is_config(values: Any) -> bool:
    """Whether parsed JSON has the content of a model, data, inference or evaluation file of MindSpeed-MM."""
    return isinstance(values, dict) and (_has(values, MODEL) or _has(values, DATA))


def _has(values: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(isinstance(values.get(name), dict) for name in names)


def read(files: Sequence[Path]) -> Translation:
    """The translation of all files together. Relative paths stay relative.

    One ValueError lists each field that is missing, a placeholder, or not LLaVA-1.5's, with its file. ValueError also
    for a file that is no JSON (with line and column) or not MindSpeed-MM's, and for two files that contradict each
    other.
    """
    parsed = [(str(path), _parse(path)) for path in files]
    opened = [(_File(name, _leaves(values)), values) for name, values in parsed]
    models, datas = ([f for f, values in opened if _has(values, names)] for names in (MODEL, DATA))
    facts = [(f.name, _model(f, bool(datas))) for f in models]
    model = next((own["model"] for _, own in facts if own["model"]), Llava())
    facts += [(f.name, _data(f, model.vision.image)) for f in datas]
    for f, _ in opened:
        f.refuse_unknown()
    if wrong := [line for f, _ in opened for line in f.wrong]:
        raise ValueError(f"{len(wrong)} fields of MindSpeed-MM cannot be moved:" + "".join(f"\n  {w}" for w in wrong))
    joined = _joined(facts)
    return Translation(
        joined.get("model"),
        tuple(joined[f"{part}.ckpt_path"] for part in PARTS if f"{part}.ckpt_path" in joined),
        joined.get("from_pretrained"),
        _pretrain(joined) if datas else None,
        joined.get("image_mode"),
        tuple(f"{f.name}: {k} = {v!r}" for f, _ in opened for k, v in f.leaves.items() if k not in f.taken),
    )


def pretrain_config(t: Translation, base: Path) -> dict:
    """A config.json of recipes/pretrain.py that trains from `base`, a checkpoint of ours with the converted weights.

    ValueError if no data.json was among the files.
    """
    if t.pretrain is None:
        raise ValueError("no data.json of MindSpeed-MM was given; a training config needs one")
    return t.pretrain | {"base": str(base)}


def _parse(path: Path) -> dict[str, Any]:
    values = fields.load(path)
    if not is_config(values):
        names = ", ".join(MODEL + DATA)
        raise ValueError(f"{path}: no JSON of MindSpeed-MM's LLaVA-1.5 example, which has one of {names}")
    return values


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Path -> value of each field without fields of its own. A list of plain values is one value."""
    if isinstance(value, dict) and value:
        below = [(f"{path}.{name}" if path else name, v) for name, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        below = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for inner, v in below for name, leaf in _leaves(v, inner).items()}


def _model(f: _File, training: bool) -> dict[str, Any]:
    """The facts in a file with a model. training: whether a data.json is given, too."""
    for check in MODEL_CHECKS:
        f.check(*check)
    facts: dict[str, Any] = {f"{part}.ckpt_path": f.optional_path(f"{part}.ckpt_path") for part in PARTS}
    facts["model"] = _llava(f)
    if f.inside("generation_config"):  # inference or evaluation; both pad
        facts |= {"image_mode": "pad", "from_pretrained": f.optional_path("tokenizer.from_pretrained")}
    elif training:
        facts |= {"train": _train(f), "dtype": f.choice(f"{LLAMA}.params_dtype", DTYPES)}
        facts["recompute"] = f.choice(f"{LLAMA}.recompute_granularity", RECOMPUTE)
    return facts


def _llava(f: _File) -> Llava | None:
    """The model, after checks of the fields that follow from its sizes; None if a size is missing or wrong."""
    sizes: dict[str, dict[str, Any]] = {
        part: {k: f.size(f"{part}.{name}") for k, name in names.items()} for part, names in SIZES
    }
    for part, config in sizes.items():
        config["eps"] = _eps(f, f"{part}.layernorm_epsilon")
    vision, llama = sizes[VISION], sizes[LLAMA]
    llama["kv_heads"] = f.size(f"{LLAMA}.num_query_groups", llama["heads"] or 1)
    for name in FOLLOWING:
        f.take(name)  # known even where it cannot be checked
    if None in (*vision.values(), *llama.values()):
        return None
    if vision["blocks"] == 23:  # ViT-L without its last block, which LLaVA does not run
        vision["blocks"] = 24
    try:
        model = Llava(Vision(**vision, feature_layer=-2), Llama(**llama))
    except ValueError as error:
        f.wrong.append(f"{f.name}: {error}")
        return None
    width, head = model.vision.width, model.vision.width // model.vision.heads
    f.check(f"{VISION}.num_query_groups", model.vision.heads, model.vision.heads)
    f.check(f"{VISION}.kv_channels", head, head)
    f.check(f"{LLAMA}.kv_channels", model.llama.head, model.llama.head)
    f.check(f"{PROJECTOR}.input_size", width, REQUIRED)
    f.check(f"{PROJECTOR}.hidden_size", model.llama.width, REQUIRED)
    f.check(f"{PROJECTOR}.ffn_hidden_size", model.llama.width, 4 * model.llama.width)
    return model


def _eps(f: _File, name: str) -> float | None:
    value = f.take(name, 1e-5)
    if isinstance(value, float) and 0 < value < math.inf:
        return value
    f.refuse(name, "; wanted: a number above 0")
    return None


def _train(f: _File) -> str | None:
    names = [f"{part}.freeze" for part in PARTS]
    freeze = [f.take(name) for name in names]
    odd = [name for name, value in zip(names, freeze, strict=True) if not isinstance(value, bool)]
    for name in odd:
        f.refuse(name, "; wanted: true or false")
    if not odd and tuple(freeze) not in TRAINS:
        values = ", ".join(f"{name} = {value}" for name, value in zip(names, freeze, strict=True))
        f.wrong.append(f"{f.name}: {values}; what can be trained is {', '.join(TRAINS.values())}")
    return None if odd else TRAINS.get(tuple(freeze))


def _data(f: _File, image: int) -> dict[str, Any]:
    """The facts in a data.json. image: pixels per side of the model's images."""
    for check in DATA_CHECKS:
        f.check(*check)
    for name in ("crop_size.height", "crop_size.width", "size.shortest_edge"):
        f.check(f"{PIPELINE}.{name}", image, REQUIRED)
    if f.take("dataset_param.dataset_type") not in ("multimodal", "image"):
        f.refuse("dataset_param.dataset_type", "; wanted: 'multimodal', or 'image' as in its first versions")
    sources = [_source(f, item) for entry in f.items(BASIC) for item in _entries(f, entry)]
    return {
        "data_path": None if None in sources else tuple(sources),
        "from_pretrained": f.path("dataset_param.tokenizer_config.from_pretrained"),
        "template": f.choice("dataset_param.template_name", TEMPLATES),
        "image_mode": "pad",  # MindSpeed-MM ignores pad2square and pads every image that it trains on
    }


def _entries(f: _File, name: str) -> list[str]:
    inner = f.items(f"{name}.data_path")  # may be a list of data sets
    return [name] if inner == [f"{name}.data_path"] else inner


def _source(f: _File, name: str) -> Source | None:
    f.check(f"{name}.data_storage_mode", "standard", "standard")
    records, images = f.path(f"{name}.data_path"), f.path(f"{name}.data_folder")
    if records and records.suffix not in (".json", ".jsonl"):
        f.refuse(f"{name}.data_path", "; wanted: a .json or .jsonl file; write the records as one")
    times = f.take(f"{name}.repeat_time", 1)
    whole = isinstance(times, (int, float)) and not isinstance(times, bool) and times >= 0 and times % 1 == 0
    if not whole:  # Source.weight < 1 draws other records in each epoch
        f.refuse(
            f"{name}.repeat_time",
            "; wanted: a whole number. Below 1 MindSpeed-MM takes the first records of the file, which the weight of a "
            "source cannot express; write these records to a file of their own",
        )
    return Source(records, images, float(times)) if whole and records and images else None


def _joined(facts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The facts of all files, given as (file, facts), without None. ValueError names two files that disagree."""
    joined, origin = {}, {}
    for name, own in facts:
        for key, value in ((k, v) for k, v in own.items() if v is not None):
            if key in joined and joined[key] != value:
                lines = "; ".join(differences(plain(joined[key]), plain(value), key))
                raise ValueError(
                    f"{origin[key]} and {name} contradict each other; give only files that belong together: {lines}"
                )
            joined[key], origin[key] = value, name
    return joined


def _pretrain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Pretrain that the files give, and those without a default. No JSON of MindSpeed-MM has the rest."""
    data = {"sources": plain(facts["data_path"]), "template": facts["template"], "image_mode": facts["image_mode"]}
    own = {key: facts[key] for key in ("dtype", "recompute") if key in facts}
    return {"run_dir": "runs/pretrain", "data": data, "optim": {}, "train": facts.get("train", "projector")} | own
