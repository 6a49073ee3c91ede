"""What is known of each field of the JSON files on the hub: those of transformers, and LLaVA's own.

Sources: transformers 4.31 to 5.24 (configuration_utils.py, configuration_llama.py, configuration_clip.py,
configuration_llava.py, generation/configuration_utils.py, image_processing_clip.py, tokenization_llama.py), LLaVA
llava_arch.py and train.py. A default here is the one of that code. FREE are fields of training, of names and versions,
and of how transformers runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_fn.config import Vision
from llava_fn.fields import OTHER, Field, Table, choice, flag, free, inside, integer, number, only, whole


def _is_id(value: Any) -> bool:
    """One id, or several, of tokens."""
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(x, int) and not isinstance(x, bool) for x in ids)


TOKENS = Field(_is_id, "it must be the id of a token")  # compared with the tokenizer's, see vocabulary.py
PRECISE = replace(only(None), wanted="the weights are quantised; give the original ones, in 16 or 32 bits")
# generate() of transformers reads these; here a person chooses how to sample.
SAMPLING = free(
    "do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature top_k top_p top_h min_p "
    "typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty encoder_repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size max_length max_new_tokens min_length "
    "min_new_tokens max_time penalty_alpha exponential_decay_length_penalty renormalize_logits remove_invalid_values "
    "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate return_legacy_cache "
    "use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size compile_config "
    "disable_compile continuous_batching_config assistant_confidence_threshold assistant_early_exit "
    "assistant_ensemble_weight assistant_lookbehind target_lookbehind is_assistant num_assistant_tokens "
    "num_assistant_tokens_schedule prompt_lookup_num_tokens max_matching_ngram_size speculation_type use_mtp "
    "dola_layers transformers_version _from_model_config pad_token_id decoder_start_token_id"
)
# These force, forbid or favour tokens in every answer of the model. Each is null where transformers writes it.
STEERING = dict.fromkeys(
    "bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id forced_decoder_ids "
    "force_words_ids constraints sequence_bias stop_strings guidance_scale watermarking_config".split(),
    only(None),
)
GENERATION: Table = SAMPLING | STEERING | {
    "bos_token_id": TOKENS, "eos_token_id": TOKENS, "generation_kwargs": only({}, None),
    "token_healing": only(False, None),
}  # fmt: skip
CONFIG: Table = SAMPLING | STEERING | free(
    "_name_or_path _model_name_or_path _commit_hash architectures torch_dtype dtype attn_implementation "
    "_attn_implementation _attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled "
    "unsloth_version unsloth_fixed finetuning_task id2label label2id num_labels problem_type task_specific_params "
    "prefix return_dict torchscript use_bfloat16 tf_legacy_loss tokenizer_class chunk_size_feed_forward is_decoder "
    "initializer_range initializer_factor attention_dropout dropout sep_token_id unk_token_id bos_token_id "
    "eos_token_id"
) | {
    "is_encoder_decoder": only(False), "add_cross_attention": only(False), "cross_attention_hidden_size": only(None),
    "tie_encoder_decoder": only(False), "pruned_heads": only({}, None), "quantization_config": PRECISE,
    "compression_config": PRECISE,
}  # fmt: skip
ROPE: Table = {
    "rope_type": only("default"), "type": only("default"), "rope_theta": number(None),
    "partial_rotary_factor": only(1.0),
    OTHER: replace(only(None), wanted="this Llama scales its rotary embedding, which is not supported"),
}  # fmt: skip
LLAMA: Table = CONFIG | free("max_position_embeddings max_sequence_length pretraining_tp") | {
    "model_type": only("llama"),
    "vocab_size": whole(32000), "hidden_size": whole(4096), "intermediate_size": whole(11008),
    "num_hidden_layers": whole(32), "num_attention_heads": whole(32), "num_key_value_heads": whole(None),
    "head_dim": whole(None), "rms_norm_eps": number(1e-6), "tie_word_embeddings": flag(False),
    "rope_theta": number(None), "rope_parameters": inside(ROPE), "rope_scaling": inside(ROPE),
    "bos_token_id": TOKENS, "eos_token_id": TOKENS,
    "hidden_act": only("silu"), "attention_bias": only(False), "mlp_bias": only(False), "is_causal": only(True),
    "partial_rotary_factor": only(1.0),
}  # fmt: skip
VISION: Table = CONFIG | free("projection_dim vocab_size tie_word_embeddings") | {
    "model_type": only("clip_vision_model"),
    "image_size": whole(224), "patch_size": whole(32), "hidden_size": whole(768), "intermediate_size": whole(3072),
    "num_hidden_layers": whole(12), "num_attention_heads": whole(12), "layer_norm_eps": number(1e-5),
    "hidden_act": choice("quick_gelu", "gelu", default="quick_gelu"), "num_channels": only(3),
}  # fmt: skip
_TEXT = "text_config text_config_dict projection_dim logit_scale_init_value tie_word_embeddings"  # LLaVA has no use
CLIP: Table = CONFIG | free(_TEXT) | {
    "model_type": only("clip"), "vision_config": inside(VISION, {}),
    "vision_config_dict": inside(VISION),  # of files before transformers 4.28; there it overrides vision_config
}  # fmt: skip
IMAGE_MODES = ("pad", "square")
_MM: Table = free(  # of LLaVA's own code; converted folders of transformers may have them too
    "mm_hidden_size use_mm_proj tune_mm_mlp_adapter freeze_mm_mlp_adapter tune_mm_vision_resampler "
    "freeze_mm_vision_resampler mm_projector_lr mm_vision_tower_lr image_grid_pinpoints s2_scales "
    "tokenizer_model_max_length tokenizer_padding_side"
) | {
    "mm_vision_tower": Field(lambda v: isinstance(v, str) and "clip" in v.lower(), "only a CLIP is supported"),
    "mm_projector_type": only("mlp2x_gelu"), "mm_vision_select_feature": only("patch"),
    "mm_use_im_start_end": only(False), "mm_use_im_patch_token": only(False), "mm_patch_merge_type": only("flat"),
    "mm_resampler_type": only(None), "s2": only(False, None),
}  # fmt: skip
LLAVA: Table = {**CONFIG, **_MM} | free("ignore_index image_seq_length vocab_size tie_word_embeddings") | {
    "model_type": only("llava"), "text_config": inside(LLAMA, {}), "vision_config": inside(VISION, {}),
    "image_token_index": whole(None), "image_token_id": whole(None), "vision_feature_layer": integer(-2),
    "vision_feature_select_strategy": only("default"), "projector_hidden_act": only("gelu"),
    "multimodal_projector_bias": only(True),
}  # fmt: skip
LLAVA_LLAMA: Table = {**LLAMA, **_MM} | {  # of LLaVA's own code, and of a Llama alone
    "model_type": only("llava_llama", "llava", "llama"), "mm_vision_config": inside(VISION),
    "mm_vision_select_layer": integer(-2), "image_aspect_ratio": choice(*IMAGE_MODES, default=None),
    "unfreeze_mm_vision_tower": flag(None),
}  # fmt: skip
_EDGES: Table = dict.fromkeys(("shortest_edge", "height", "width"), whole(None))
_EDGE = Field(lambda v: isinstance(v, Mapping) or v is None or whole().fits(v), "it must be one size", table=_EDGES)
PIXELS = {  # of LLaVA-1.5's images; transformers has the same defaults
    "do_convert_rgb": True, "do_resize": True, "resample": 3,  # bicubic
    "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(Vision.mean), "image_std": list(Vision.std),
}  # fmt: skip
PADS = {  # class of image processor -> whether it pads to a square if do_pad is set
    f"{name}{suffix}": pads
    for name, pads in (("CLIPImageProcessor", False), ("CLIPFeatureExtractor", False), ("LlavaImageProcessor", True))
    for suffix in ("", "Fast", "Pil")
}
IMAGE_PROCESSOR: Table = free(
    "processor_class _processor_class _valid_processor_keys input_data_format data_format return_tensors device "
    "disable_grouping default_to_square"
) | {name: only(value) for name, value in PIXELS.items()} | {
    "image_processor_type": choice(*PADS, default=None), "feature_extractor_type": choice(*PADS, default=None),
    "do_pad": flag(None), "size": _EDGE, "crop_size": _EDGE,
}  # fmt: skip
PROCESSOR: Table = free("processor_class image_token chat_template num_additional_image_tokens") | {
    "patch_size": whole(None), "vision_feature_select_strategy": only("default", None),
    "image_processor": inside(IMAGE_PROCESSOR),
}  # fmt: skip
