"""MindSpeed-MM's JSON files for tests, as its examples hold them, and those of the tiny model of layouts.py."""

import json
from pathlib import Path

from layouts import C


def off(names):
    return dict.fromkeys(names.split(), False)


def model_json(dtype="bf16"):
    """What model.json of the example holds, field by field."""
    same = {dtype: True, "params_dtype": dtype}
    layers = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "attention_softmax_in_fp32": True} | same
    fused = off("bias_activation_fusion bias_dropout_fusion apply_rope_fusion layernorm_zero_centered_gamma")
    llama = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 32}
    llama |= {"ffn_hidden_size": 11008, "language_vocab_size": 32000, "language_max_sequence_length": 4096}
    llama |= {"max_position_embeddings": 4096, "lm_position_embedding_type": "rope", "activation_func": "silu"}
    llama |= {"normalization": "RMSNorm", "gated_linear_unit": True, "ckpt_path": "w/vicuna.pt", "freeze": True}
    llama |= {"deallocate_pipeline_outputs": True, "persist_layer_norm": True, "recompute_num_layers": 32}
    llama |= {"recompute_granularity": "full", "recompute_method": "block"} | layers | fused
    llama |= off("add_bias_linear apply_query_key_layer_scaling")
    vision = {"model_id": "clip", "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
    vision |= {"num_query_groups": 16, "ffn_hidden_size": 4096, "kv_channels": 64, "patch_size": 14, "image_size": 336}
    vision |= {"normalization": "LayerNorm", "activation_func": "quick_gelu", "device": "npu", "class_token_len": 1}
    vision |= dict.fromkeys(("add_bias_linear", "add_qkv_bias", "add_class_token", "freeze"), True) | layers | fused
    vision |= off("post_layer_norm gated_linear_unit") | {"ckpt_path": "w/clip.pt"}
    mlp = {"model_id": "mlp", "num_layers": 2, "num_attention_heads": 1, "input_size": 1024, "hidden_size": 4096}
    mlp |= {"ffn_hidden_size": 4096, "activation_func": "gelu", "add_bias_linear": True, "ckpt_path": None} | same
    mlp |= off("gated_linear_unit bias_activation_fusion freeze")
    parts = {"text_decoder": llama, "image_encoder": {"vision_encoder": vision, "vision_projector": mlp}}
    return {"model_id": "llava", "text_encoder": None, "video_encoder": None} | parts


def data_json():
    """What data.json of the example holds."""
    pipeline = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "pad2square": False}
    pipeline |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    pipeline |= {"resample": 3, "rescale_factor": 0.00392156862745098}
    pipeline |= {f"do_{step}": True for step in ("center_crop", "convert_rgb", "normalize", "rescale", "resize")}
    words = {"hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": "hf/vicuna"}
    words |= {"cache_dir": None, "padding_side": "right", "use_fast": False}
    loader = {"dataloader_mode": "sampler", "shuffle": True, "drop_last": True, "pin_memory": True}
    loader |= {"sampler_type": "BaseRandomBatchSampler", "collate_param": {"model_name": "llava", "pad_token_id": 0}}
    dataset = {"dataset_type": "multimodal", "use_text_processer": True, "template_name": "llava-plain"}
    dataset |= {"basic_parameters": {"data_path": "d/records.json", "data_folder": "d/images"}}
    dataset |= {"preprocess_parameters": {"image_reader_type": "CLIPImageProcessor", "train_pipeline": pipeline}}
    dataset |= {"tokenizer_config": words, "mm_use_im_start_end": False}
    return {"dataset_param": dataset, "dataloader_param": loader}


def inference_json():
    """What inference_llava.json of the example holds, with a part of its generation settings."""
    values = model_json("fp16")
    for name in ("recompute_granularity", "recompute_method", "recompute_num_layers"):
        del values["text_decoder"][name]
    values["text_decoder"]["is_encoder_decoder"] = False
    values["image_encoder"]["vision_projector"] |= {"bf16": True, "freeze": True, "ckpt_path": "w/mlp.pt"}
    words = {"hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": "hf/vicuna"}
    ways = {"max_new_tokens": 512, "temperature": 0.2, "do_sample": True, "bad_words_ids": None}
    values |= {"pipeline_class": "LlavaPipeline", "dtype": "fp16", "device": "npu", "tokenizer": words}
    return values | {"generation_config": ways, "image_processer_path": "c", "image_path": "v.jpg", "prompts": "hi"}


def evaluate_json():
    """What evaluate_llava1_5.json of the example holds, with a part of its generation settings."""
    values = inference_json()
    for name in ("pipeline_class", "image_path", "prompts"):
        del values[name]
    values["tokenizer"]["use_fast"] = False
    values |= {"dataset_path": "./AI2D_TEST.tsv", "evaluation_dataset": "ai2d_test"}
    return values | {"evaluation_model": "llava_v1.5_7b", "result_output_path": "./out/"}


def mindspeed_json(folder: Path, weights: list[Path], data: Path) -> list[Path]:
    """model.json and data.json of the example, for this tiny model and a data set."""
    v, t = C.vision, C.llama
    model, train = model_json(), data_json()
    heads = {"num_attention_heads": t.heads, "num_query_groups": t.kv_heads, "ffn_hidden_size": t.ffn}
    sizes = {"num_layers": t.blocks, "hidden_size": t.width, "language_vocab_size": t.vocab}
    model["text_decoder"] |= {**heads, **sizes, "ckpt_path": str(weights[1])}
    encoder, projector = (model["image_encoder"][name] for name in ("vision_encoder", "vision_projector"))
    encoder |= {"num_layers": v.blocks, "hidden_size": v.width, "num_attention_heads": v.heads, "image_size": v.image,
                "num_query_groups": v.heads, "ffn_hidden_size": v.ffn, "ckpt_path": str(weights[0])}  # fmt: skip
    projector |= {"input_size": v.width, "hidden_size": t.width, "ffn_hidden_size": t.width}
    projector["ckpt_path"] = str(weights[2])
    dataset = train["dataset_param"]
    dataset["basic_parameters"] = {"data_path": str(data / "train.json"), "data_folder": str(data)}
    dataset["tokenizer_config"]["from_pretrained"] = str(weights[0].parent)
    dataset["preprocess_parameters"]["train_pipeline"] |= {
        "crop_size": {"height": v.image, "width": v.image}, "size": {"shortest_edge": v.image},
    }  # fmt: skip
    for name, values in (("model.json", model), ("data.json", train)):
        (folder / name).write_text(json.dumps(values))
    return [folder / "model.json", folder / "data.json"]
