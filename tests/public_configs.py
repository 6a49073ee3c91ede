"""JSON files as other programs write them, field by field: of transformers 4.31 to 4.56, PEFT 0.6, and of the hub."""

NULL = (
    "torch_dtype dtype cross_attention_hidden_size bad_words_ids forced_bos_token_id forced_eos_token_id "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens architectures finetuning_task "
    "tokenizer_class prefix sep_token_id decoder_start_token_id task_specific_params problem_type pad_token_id"
).split()
SAMPLING = {
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1, "output_scores": False, "output_attentions": False, "output_hidden_states": False,
    "return_dict_in_generate": False, "remove_invalid_values": False, "transformers_version": "4.56.0",
}  # fmt: skip
BASE = {  # to_dict() of any config
    **dict.fromkeys(NULL), **SAMPLING, "return_dict": True, "torchscript": False, "use_bfloat16": False,
    "tf_legacy_loss": False, "pruned_heads": {}, "is_encoder_decoder": False, "is_decoder": False,
    "add_cross_attention": False, "tie_encoder_decoder": False, "chunk_size_feed_forward": 0, "_name_or_path": "",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "bos_token_id": None,
    "eos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_4 = BASE | {
    "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-06, "pretraining_tp": 1, "use_cache": True, "rope_scaling": None,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "model_type": "llama", "rope_theta": 10000.0,
    "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "head_dim": 128,
}  # fmt: skip
VISION_4 = BASE | {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "patch_size": 32, "image_size": 224, "initializer_range": 0.02,
    "initializer_factor": 1.0, "attention_dropout": 0.0, "layer_norm_eps": 1e-05, "hidden_act": "quick_gelu",
    "model_type": "clip_vision_model",
}  # fmt: skip
CLIP_4 = BASE | {
    "_commit_hash": None, "projection_dim": 512, "logit_scale_init_value": 2.6592, "initializer_factor": 1.0,
    "model_type": "clip", "vision_config": VISION_4, "text_config": {"model_type": "clip_text_model"},
}  # fmt: skip
LLAVA_4 = BASE | {
    "ignore_index": -100, "image_token_index": 32000, "projector_hidden_act": "gelu", "image_seq_length": 576,
    "vision_feature_select_strategy": "default", "vision_feature_layer": -2, "vocab_size": 32000,
    "model_type": "llava", "multimodal_projector_bias": True, "text_config": LLAMA_4, "vision_config": VISION_4,
}  # fmt: skip
GENERATION_4 = SAMPLING | dict.fromkeys((
    "max_new_tokens min_new_tokens max_time penalty_alpha bad_words_ids force_words_ids constraints "
    "forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "forced_decoder_ids sequence_bias guidance_scale pad_token_id bos_token_id eos_token_id decoder_start_token_id "
    "low_memory prompt_lookup_num_tokens stop_strings dola_layers cache_implementation cache_config "
    "return_legacy_cache min_p watermarking_config output_logits max_matching_ngram_size prefill_chunk_size "
    "assistant_early_exit").split()) | {
    "use_cache": True, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0,
    "renormalize_logits": False, "generation_kwargs": {}, "_from_model_config": False, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "token_healing": False, "is_assistant": False,
    "assistant_confidence_threshold": 0.4, "assistant_lookbehind": 10, "target_lookbehind": 10,
    "disable_compile": False,
}  # fmt: skip
FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
TOKEN = {name: {"__type": "AddedToken", "content": text, **FLAGS} for name, text in
         (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
TOKENIZER_431 = TOKEN | {
    "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True,
    "model_max_length": 1000000000000000019884624838656, "pad_token": None, "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}  # fmt: skip
TOKENIZER_456 = {
    "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "bos_token": "<s>", "eos_token": "</s>",
    "added_tokens_decoder": {str(i): {"content": text, **FLAGS, "special": True}
                             for i, text in enumerate(("<unk>", "<s>", "</s>"))},
    "clean_up_tokenization_spaces": False, "extra_special_tokens": {}, "legacy": True, "model_max_length": 4096,
    "pad_token": None, "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "use_default_system_prompt": False,
}  # fmt: skip
TOKENIZER_5 = {
    "backend": "tokenizers", "bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>",
    "image_token": "<image>", "is_local": True, "legacy": False, "local_files_only": False, "model_max_length": 4096,
    "model_specific_special_tokens": {"image_token": "<image>"}, "pad_token": "<pad>", "padding_side": "left",
    "processor_class": "LlavaProcessor", "tokenizer_class": "TokenizersBackend", "unk_token": "<unk>",
}  # fmt: skip
PEFT_06 = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "x", "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 256, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 128,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip

# On the hub.
VICUNA = {  # lmsys/vicuna-7b-v1.5
    "_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
LIUHAOTIAN = VICUNA | {  # liuhaotian/llava-v1.5-7b
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
    "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None, "max_length": 4096, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "tune_mm_mlp_adapter": False,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
}  # fmt: skip
FINETUNED = LIUHAOTIAN | {  # what LLaVA's train.py adds today
    "model_type": "llava_llama", "mm_projector_lr": 2e-5, "mm_patch_merge_type": "flat", "attention_bias": False,
    "attention_dropout": 0.0, "rope_theta": 10000.0, "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right", "transformers_version": "4.37.2",
}  # fmt: skip
LLAVA_HF = {  # llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    },
    "torch_dtype": "float16", "transformers_version": "4.36.0.dev0", "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
          "patch_size": 14, "projection_dim": 768}  # fmt: skip
CLIP = {  # openai/clip-vit-large-patch14-336, written by transformers 4.21
    "_name_or_path": "", "architectures": ["CLIPModel"], "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 768, "torch_dtype": "float32",
    "transformers_version": None, "text_config": BASE | {"dropout": 0.0}, "text_config_dict": {"hidden_size": 768},
    "vision_config": BASE | _TOWER | {
        "dropout": 0.0, "hidden_act": "quick_gelu", "image_size": 336, "initializer_factor": 1.0,
        "initializer_range": 0.02, "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
    },
    "vision_config_dict": _TOWER | {"image_size": 336},
}  # fmt: skip
OLD_PREPROCESSOR = {  # of CLIP on the hub
    "feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "crop_size": 336, "size": 336, "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
PREPROCESSOR = OLD_PREPROCESSOR | {  # of llava-hf on the hub
    "feature_extractor_type": None, "_valid_processor_keys": ["images", "do_resize"], "processor_class": "X",
    "crop_size": {"height": 336, "width": 336}, "do_convert_rgb": True, "do_rescale": True,
    "image_processor_type": "CLIPImageProcessor", "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}  # fmt: skip
VICUNA_GENERATION = {
    "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0,
    "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0",
}  # fmt: skip
