"""The files beside exported weights, as transformers reads them, and the way back to our configs.

STAND_IN is a public vocabulary built like Llama's (32000 pieces, BPE, byte fallback, the same control tokens).
"""

import dataclasses
import importlib.util
import io
import json
import re
import struct
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_fn import vit
from llava_fn.config import LLAVA_13B, Llama, Llava, Vision
from llava_fn.data import image
from llava_fn.data.templates import TEMPLATES
from llava_fn.data.text import render
from llava_fn.data.tokenizer import open_tokenizer
from llava_fn.weights import configs, hub
from llava_fn.weights.companions import OPEN_SYSTEM, liuhaotian, llava_hf, padded
from llava_fn.weights.image_processor import image_mode_of
from llava_fn.weights.model import from_state_dict

STAND_IN = (
    Path(importlib.util.find_spec("mistral_common").submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
).read_bytes()
SMALL = Llava(
    Vision(image=45, patch=9, width=32, blocks=4, heads=4, ffn=64),
    Llama(vocab=32000, width=16, blocks=2, heads=2, kv_heads=2, ffn=32),
)
# Of the 512 pieces of the emoji tokenizer; no value is a default of transformers or of ours.
CONFIGS = {
    "grouped": Llava(
        Vision(image=35, patch=5, width=42, blocks=3, heads=3, ffn=50, eps=1e-3, act="gelu"),
        Llama(vocab=512, width=60, blocks=5, heads=6, kv_heads=2, ffn=70, theta=500.5, eps=1e-4),
    ),
    "tied": Llava(
        Vision(image=16, patch=8, width=24, blocks=6, heads=2, ffn=96, feature_layer=-3),
        Llama(vocab=512, width=40, blocks=4, heads=5, kv_heads=1, ffn=56, tied=True, theta=1_000_000),
    ),
    "counted from the front": Llava(
        Vision(image=32, patch=4, width=20, blocks=5, heads=5, ffn=30, feature_layer=4, eps=1e-6),
        Llama(vocab=512, width=24, blocks=1, heads=3, kv_heads=3, ffn=26, eps=1e-6),
    ),
}
SPACE = "\u2581"
SMILE = "\U0001f600"
TEXTS = (
    "Hello this is a test", "a  b", "", "\n", "x\n\ny\n", "1234 5.6", "\u4e2d\u6587\u5b57\u5e55 \u6d4b\u8bd5",
    f"{SMILE}\U0001fae0 ok {SMILE}", "\tif x:\n\t\treturn    y   # z", "e\u0301 \x00 \u00e9 \ufb01 \u2460",
    "<0x0A> <unk2", "aaaaaaaaaaaaaa!!!!!!!!!!????", "=" * 33 + "-" * 21, "a" + " " * 37 + "b", "x ", "x" + " " * 90,
    f"a{SPACE}b", "\r\n\u200b\u3000\ud7ff\U0010ffff",
)  # fmt: skip


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def parsed(files: dict[str, bytes]) -> dict[str, dict]:
    return {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}


@pytest.fixture(scope="session", params=["pad", "square"])
def mode(request):
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory, mode):
    return written(llava_hf(SMALL, torch.bfloat16, STAND_IN, mode, "vicuna_v1"), tmp_path_factory.mktemp(mode))


@pytest.fixture(scope="session")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory, tokenizer):
    """(theirs, ours) for two vocabularies and the two classes of transformers that a folder can be opened with."""
    pairs = []
    for c, model in ((SMALL, STAND_IN), (CONFIGS["tied"], tokenizer.model)):
        files = llava_hf(c, torch.float16, model, "pad", "vicuna_v1")
        where = written(files, tmp_path_factory.mktemp("tokenizer"))
        pairs += [(kind.from_pretrained(where), open_tokenizer(model)) for kind in (AutoTokenizer, LlamaTokenizer)]
    return pairs


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message; those of the messages here are short."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2, len(value)]) + value


def piece(text: str, score: float, kind: int) -> bytes:
    """What, put behind a sentencepiece model, adds one piece to it."""
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def trained(**options) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat", "the hat that the cat had"]), model_writer=out, byte_fallback=True,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2, vocab_size=280, **options,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize(
    "vocab, rows", [(32000, 32064), (1, 64), (62, 64), (63, 128), (126, 128), (127, 192), (49152, 49216)]
)
def test_padded_vocabulary_is_the_next_multiple_of_64_that_holds_image_and_pad(vocab, rows):
    assert padded(vocab) == rows


def test_folders_hold_these_files_and_the_tokenizer_unchanged():
    hf = llava_hf(SMALL, torch.float16, STAND_IN, "pad", "vicuna_v1")
    assert sorted(hf) == [
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
        "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    original = liuhaotian(SMALL, torch.float16, STAND_IN, "pad")
    assert sorted(original) == [
        "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    assert hf["tokenizer.model"] == original["tokenizer.model"] == STAND_IN
    assert parsed(hf)["chat_template.json"] == {"chat_template": hf["chat_template.jinja"].decode()}


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS)
def test_hf_config_gives_the_model_back(c, tokenizer, tmp_path):
    files = llava_hf(c, torch.bfloat16, tokenizer.model, "pad", "vicuna_v1")
    raw, loaded = parsed(files)["config.json"], LlavaConfig.from_pretrained(written(files, tmp_path))
    for values in (raw, loaded.to_dict()):
        stated = configs.stated("config.json", values)
        assert stated.llama.vocab == 576
        text = dataclasses.replace(stated.llama, vocab=stated.image_row)
        assert Llava(stated.vision, text) == c
    assert raw["tie_word_embeddings"] == loaded.tie_word_embeddings == c.llama.tied
    assert loaded.text_config.max_position_embeddings == 4096
    assert loaded.image_seq_length == c.vision.patches
    assert loaded.vision_config.projection_dim == 768
    assert loaded.dtype == loaded.text_config.dtype == loaded.vision_config.dtype == torch.bfloat16
    assert loaded.projector_hidden_act == "gelu" and loaded.multimodal_projector_bias
    assert loaded.vision_feature_select_strategy == "default"
    assert (loaded.text_config.bos_token_id, loaded.text_config.eos_token_id) == (1, 2)
    assert loaded.image_token_id == 512 and loaded.pad_token_id == loaded.text_config.pad_token_id == 513


def test_transformers_4_finds_its_spelling_of_the_same_values(tokenizer):
    c = CONFIGS["grouped"]
    raw = parsed(llava_hf(c, torch.float16, tokenizer.model, "pad", "vicuna_v1"))["config.json"]
    assert raw["text_config"]["rope_theta"] == raw["text_config"]["rope_parameters"]["rope_theta"] == 500.5
    for part in (raw, raw["text_config"], raw["vision_config"]):
        assert part["torch_dtype"] == part["dtype"] == "float16"
    assert raw["image_token_id"] == raw["image_token_index"] == 512


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS)
def test_nothing_that_an_import_reads_is_left_to_a_default(c, tokenizer):
    hf = parsed(llava_hf(c, torch.float16, tokenizer.model, "pad", "vicuna_v1"))["config.json"]
    original = parsed(liuhaotian(c, torch.float16, tokenizer.model, "pad"))["config.json"]
    aside = {"rope_scaling", "unfreeze_mm_vision_tower", "mm_vision_tower"}  # null is what they would say
    for values, table in (
        (hf, hub.LLAVA), (hf["text_config"], hub.LLAMA), (hf["vision_config"], hub.VISION),
        (original, hub.LLAVA_LLAMA), (original["mm_vision_config"], hub.VISION),
    ):  # fmt: skip
        assert {name for name, field in table.items() if field.used} - aside <= set(values)


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS)
def test_the_model_of_the_hf_config_has_the_shapes_of_ours(c, tokenizer, tmp_path):
    written(llava_hf(c, torch.float32, tokenizer.model, "pad", "vicuna_v1"), tmp_path)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(tmp_path))
    state = model.state_dict()
    wide = dataclasses.replace(c, llama=dataclasses.replace(c.llama, vocab=padded(c.llama.vocab)))
    from_state_dict(state, wide)  # refuses what is missing or has another shape
    blocks = {name.split(".")[4] for name in state if name.startswith("model.vision_tower.encoder.layers.")}
    assert blocks == {str(i) for i in range(c.vision.blocks)}
    assert len(model.model.language_model.layers) == c.llama.blocks


@pytest.mark.parametrize("c", CONFIGS.values(), ids=CONFIGS)
def test_a_tower_without_its_unused_blocks_gives_the_same_features(c, tokenizer, tmp_path):
    models, used = [], dataclasses.replace(c.vision, blocks=c.vision.used, feature_layer=-1)
    for vision in (c.vision, used):
        files = llava_hf(Llava(vision, c.llama), torch.float32, tokenizer.model, "pad", "vicuna_v1")
        where = written(files, tmp_path / str(vision.blocks))
        models.append(LlavaForConditionalGeneration(LlavaConfig.from_pretrained(where)))
    full, short = (m.eval() for m in models)
    for p in full.model.vision_tower.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    state = full.state_dict()
    short.load_state_dict({name: state[name] for name in short.state_dict()})
    assert len(short.model.vision_tower.encoder.layers) == c.vision.used < c.vision.blocks
    pixels = torch.randn(2, 3, c.vision.image, c.vision.image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (m.model.get_image_features(pixel_values=pixels).pooler_output for m in (full, short))
    assert torch.equal(torch.cat(list(a)), torch.cat(list(b)))


def test_generation_config_is_greedy_and_can_be_saved_again(folder, tmp_path):
    loaded = GenerationConfig.from_pretrained(folder)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 32001)
    assert loaded.do_sample is False and loaded.temperature is None and loaded.top_p is None
    loaded.save_pretrained(tmp_path)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_sentencepiece_and_decode_to_the_text(text, tokenizers):
    for theirs, ours in tokenizers:
        ids = theirs(text).input_ids
        assert ids == [ours.bos] + (ours.encode(" " + text) if text else [])
        assert theirs.decode(ids, skip_special_tokens=True) == text.replace(SPACE, " ")


@given(st.text(st.sampled_from("aabcdeinorst  \n.,!19UESR\u4e2d\u00e9" + SMILE), max_size=40))
@settings(max_examples=300, deadline=None)
def test_ids_of_any_text_equal_sentencepiece(tokenizers, text):
    for theirs, ours in tokenizers:
        assert theirs("x" + text).input_ids == [ours.bos] + ours.encode(" x" + text)


@pytest.mark.parametrize("missing", [False, True], ids=["Llama's", "the stand-in's"])
def test_runs_of_spaces_of_any_length_equal_sentencepiece(missing, tokenizers, tmp_path):
    """Llama has a piece for each run of 2 to 16 spaces; the stand-in lacks the one of 15."""
    if missing:
        theirs, ours = tokenizers[0]
    else:
        model = STAND_IN + piece(SPACE * 15, -1e9, 1)
        c = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, vocab=32001))
        written(llava_hf(c, torch.float16, model, "pad", "vicuna_v1"), tmp_path)
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(model)
    for n in range(100):
        for text in ("x" + " " * n, "x" + " " * n + "y", "\n" + " " * n + "\n" + " " * (100 - n)):
            assert theirs(text).input_ids == [1] + ours.encode(" " + text)


def test_text_that_spells_the_name_of_a_byte_is_not_that_byte(tmp_path):
    model = STAND_IN + b"".join(piece(text, -4e4 - i, 1) for i, text in enumerate(("<0", "<0x", "<0x0", "A>")))
    c = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, vocab=32004))
    written(llava_hf(c, torch.float16, model, "pad", "vicuna_v1"), tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("x<0x0A>").input_ids
    assert ids == [1, *open_tokenizer(model).encode(" x<0x0A>")] and ids[-2:] == [32002, 32003]


def test_added_tokens_are_single_special_tokens_with_nothing_put_in_front_of_what_follows(tokenizers):
    for theirs, ours in tokenizers:
        mark, pad = ours.vocab_size, ours.vocab_size + 1
        assert len(theirs) == ours.vocab_size + 2
        assert theirs.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<image>", "<pad>"]) == [0, 1, 2, mark, pad]
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (1, 2, 0, pad)
        assert theirs.padding_side == "left" and theirs.model_max_length == 4096
        want = [1, *ours.encode(" USER: "), mark, *ours.encode("\nHi"), 2, *ours.encode("USER: no"), pad, mark]
        assert theirs("USER: <image>\nHi</s>USER: no<pad><image>").input_ids == want
        assert theirs.decode(want, skip_special_tokens=True) == "USER: \nHiUSER: no"
        assert theirs("x", "y").input_ids == [1, *ours.encode(" x"), 1, *ours.encode(" y")]


def test_added_tokens_and_special_tokens_files_agree_with_the_tokenizer():
    files = parsed(llava_hf(SMALL, torch.float16, STAND_IN, "pad", "vicuna_v1"))
    assert files["added_tokens.json"] == {"<image>": 32000, "<pad>": 32001}
    want = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    assert files["special_tokens_map.json"] == want
    config = files["tokenizer_config.json"]
    assert want.items() <= config.items()
    assert config["legacy"] is False and config["add_bos_token"] is True and config["add_eos_token"] is False
    assert config["tokenizer_class"] == "LlamaTokenizer" and "add_prefix_space" not in config
    both = {int(i): token["content"] for i, token in config["added_tokens_decoder"].items()}
    assert both == {t["id"]: t["content"] for t in files["tokenizer.json"]["added_tokens"]}
    assert both == {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
    for token in (*config["added_tokens_decoder"].values(), *files["tokenizer.json"]["added_tokens"]):
        assert token["special"] is True and token["normalized"] is False


@pytest.mark.parametrize("size", [(42, 42), (97, 31), (31, 97), (200, 143), (20, 17), (300, 41)], ids=str)
def test_processor_gives_our_pixels_and_an_image_token_for_each_patch(processor, mode, size):
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(sum(size)))
    picture = Image.fromarray(noise.to(torch.uint8).numpy())
    out = processor(images=picture, text="USER: <image>\nWhat is shown? ASSISTANT:", return_tensors="pt")
    assert torch.equal(out["pixel_values"], vit.normalise(image.to_pixels(picture, SMALL.vision.image, mode)[None]))
    ours = open_tokenizer(STAND_IN)
    question = ours.encode("\nWhat is shown? ASSISTANT:")
    want = [1, *ours.encode(" USER: "), *[32000] * SMALL.vision.patches, *question]
    assert out["input_ids"][0].tolist() == want and out["attention_mask"].all()


def test_processor_pads_on_the_left_with_the_pad_token(processor):
    out = processor(text=["a b c d", "a"], padding=True)
    assert out["input_ids"][1][:-2] == [32001] * (len(out["input_ids"][0]) - 2)


def said(role: str, text: str, images: int = 0) -> dict:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": role, "content": parts}


def test_chat_template_renders_as_documented(processor):
    one = [said("user", "What is shown?", 1)]
    prompt = "USER: <image>\nWhat is shown? ASSISTANT:"
    assert processor.apply_chat_template(one, add_generation_prompt=True) == prompt
    two = [*one, said("assistant", "A dog."), said("user", "Why?")]
    prompt += " A dog.</s>USER: Why?"
    assert processor.apply_chat_template(two, add_generation_prompt=False) == prompt
    assert processor.apply_chat_template(two, add_generation_prompt=True) == prompt + " ASSISTANT:"
    done = [*two, said("assistant", "Because.")]
    assert processor.apply_chat_template(done) == prompt + " ASSISTANT: Because.</s>"
    pair = processor.apply_chat_template([said("user", "Which?", 2)], add_generation_prompt=True)
    assert pair == "USER: <image>\n<image>\nWhich? ASSISTANT:"


def test_chat_template_puts_images_first_and_takes_plain_strings(processor):
    late = {
        "role": "user",
        "content": [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}],
    }
    assert processor.apply_chat_template([late]) == "USER: <image>\nAB"
    jinja = processor.chat_template
    plain = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yes"}]
    text = processor.tokenizer.apply_chat_template(plain, chat_template=jinja, tokenize=False)
    assert text == "USER: <image>\nHi ASSISTANT: Yes</s>"


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([said("tool", "x")], "no place for a message from 'tool'"),
        ([said("user", "x"), said("system", "x")], "no place for a message from 'system'"),
        ([said("user", "x"), said("assistant", "x", 1)], "content of type 'image' from assistant"),
        ([said("system", "x", 1)], "content of type 'image' from system"),
        ([{"role": "user", "content": [{"type": "video"}]}], "content of type 'video' from user"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chat_template_refuses_what_it_would_drop(processor, messages, reason):
    with pytest.raises(Exception, match=reason):
        processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_equals_our_rendering(name, tokenizer, tokenizers):
    jinja = llava_hf(CONFIGS["tied"], torch.float16, tokenizer.model, "pad", name)["chat_template.jinja"].decode()

    def rendered(messages, **options):
        return tokenizers[0][0].apply_chat_template(messages, chat_template=jinja, tokenize=False, **options)

    turns = [("human", "<image>\nWhat \"is\" 'it'?"), ("gpt", "A {{dog}}.\n"), ("human", "Why?"), ("gpt", "So.")]
    messages = [said("user", "What \"is\" 'it'?", 1), said("assistant", "A {{dog}}.\n")]
    messages += [said("user", "Why?"), said("assistant", "So.")]
    if name in OPEN_SYSTEM:
        system = [said("system", TEMPLATES[name].first.removesuffix(" USER: "))]
    else:
        system = []
        with pytest.raises(Exception, match="no place for a message from 'system'"):
            rendered([said("system", "x")])
    for n in (2,) if TEMPLATES[name].caption else (2, 4):
        assert rendered(system + messages[:n]) == render(turns[:n], TEMPLATES[name])
        opened = rendered(system + messages[: n - 1], add_generation_prompt=True)
        assert opened == render(turns[: n - 1], TEMPLATES[name])


@pytest.mark.parametrize("c", [*CONFIGS.values(), LLAVA_13B], ids=[*CONFIGS, "13B"])
def test_liuhaotian_config_gives_the_model_back(c, tokenizer):
    model = STAND_IN if c is LLAVA_13B else tokenizer.model
    values = parsed(liuhaotian(c, torch.bfloat16, model, "pad"))["config.json"]
    again = LlamaConfig.from_dict(values).to_dict() | {"model_type": "llava_llama"}
    for stated in (configs.stated("config.json", values), configs.stated("config.json", again)):
        assert Llava(stated.vision, stated.llama) == c
    assert values["mm_hidden_size"] == c.vision.width


def test_liuhaotian_files_say_what_llava_reads():
    files = parsed(liuhaotian(SMALL, torch.float16, STAND_IN, "pad"))
    want = {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "torch_dtype": "float16",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "use_mm_proj": True, "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "vocab_size": 32000, "max_position_embeddings": 4096, "mm_patch_merge_type": "flat",
    }  # fmt: skip
    assert want.items() <= files["config.json"].items()
    config = files["tokenizer_config.json"]
    want = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    assert files["special_tokens_map.json"] == want and want.items() <= config.items()
    assert config["padding_side"] == "right" and config["legacy"] is False and config["model_max_length"] == 2048
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["add_bos_token"] is True
    generation = GenerationConfig.from_dict(files["generation_config.json"])
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    generation.validate(strict=True)


def mode_of(files: dict[str, dict]) -> str | None:
    return image_mode_of(Path(), files, configs.stated("config.json", files.get("config.json", {})).image_mode)


def test_image_mode_comes_back_from_every_layout(mode, processor, tmp_path):
    assert mode_of(parsed(llava_hf(SMALL, torch.float16, STAND_IN, mode, "v1"))) == mode
    assert mode_of(parsed(liuhaotian(SMALL, torch.float16, STAND_IN, mode))) == mode
    processor.save_pretrained(tmp_path)  # transformers 5 puts the image processor into processor_config.json
    again = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert "preprocessor_config.json" not in again and mode_of(again) == mode


# The preprocessor of CLIP and that of llava-hf on the hub, as far as they matter.
OLD_CLIP = {
    "feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "crop_size": 336, "size": 336, "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
HUB = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "rescale_factor": 1 / 255,
    "crop_size": {"height": 336, "width": 336},
}  # fmt: skip


@pytest.mark.parametrize(
    "files, want",
    [
        ({}, None),
        ({"config.json": {"model_type": "llava"}, "tokenizer_config.json": {"do_pad": True}}, None),
        ({"config.json": {"image_aspect_ratio": None}}, None),
        ({"processor_config.json": {"patch_size": 14}}, None),
        ({"preprocessor_config.json": OLD_CLIP}, "square"),
        ({"preprocessor_config.json": HUB, "processor_config.json": {"patch_size": 14}}, "square"),
        ({"preprocessor_config.json": {"image_processor_type": "LlavaImageProcessor", "do_pad": False}}, "square"),
        ({"preprocessor_config.json": {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}}, "pad"),
        ({"config.json": {"image_aspect_ratio": "pad"}, "preprocessor_config.json": OLD_CLIP}, "pad"),
    ],
)
def test_image_mode_of_public_files(files, want):
    assert mode_of(files) == want


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "change",
    [
        {"image_processor_type": "LlavaNextImageProcessor"}, {"do_pad": True}, {"do_resize": False}, {"resample": 2},
        {"do_center_crop": False}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1.0},
        {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": [0.5, 0.5, 0.5]}, {"size": {"height": 336, "width": 336}},
        {"do_pad": "yes"}, {"do_convert_rgb": False},
    ],
    ids=str,
)  # fmt: skip
def test_a_processor_that_makes_other_pixels_is_refused_by_file_and_value(file, change):
    values = HUB | change
    files = {file: values if file.startswith("pre") else {"image_processor": values}}
    ((key, value),) = change.items()
    inside = "" if file.startswith("pre") or key in ("size", "do_pad") and value != "yes" else "image_processor."
    written = re.escape(repr(value) if key == "size" else json.dumps(value))
    with pytest.raises(ValueError, match=rf"^{file}: {inside}{key}={written}"):
        mode_of(files)


def test_a_crop_of_another_size_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="preprocessor_config.json: size=.*336.*crop_size=.*224"):
        mode_of({"preprocessor_config.json": HUB | {"crop_size": {"height": 224, "width": 224}}})


def test_unknown_aspect_ratio_and_files_that_disagree_are_refused():
    with pytest.raises(ValueError, match='config.json: image_aspect_ratio="anyres"'):
        mode_of({"config.json": {"image_aspect_ratio": "anyres"}})
    with pytest.raises(ValueError, match='preprocessor_config.json: do_pad="yes"'):
        mode_of({"preprocessor_config.json": {"image_processor_type": "LlavaImageProcessor", "do_pad": "yes"}})
    pads = {"image_processor": {"image_processor_type": "LlavaImageProcessor", "do_pad": True}}
    with pytest.raises(ValueError, match="disagree.*preprocessor_config.json.*square.*processor_config.json.*pad"):
        mode_of({"preprocessor_config.json": HUB, "processor_config.json": pads})


def exports(c=SMALL, dtype=torch.float16, model=STAND_IN, mode="pad"):
    yield lambda: llava_hf(c, dtype, model, mode, "v1")
    yield lambda: liuhaotian(c, dtype, model, mode)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"c": CONFIGS["tied"]}, "32000 pieces, but llama.vocab=512"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"mode": "anyres"}, "image mode 'anyres'"),
        ({"model": b"no model"}, "not a sentencepiece model"),
    ],
    ids=["vocabulary", "dtype", "mode", "tokenizer"],
)
def test_what_cannot_be_exported_is_refused(change, reason):
    for export in exports(**change):
        with pytest.raises(ValueError, match=reason):
            export()


def test_unknown_template_is_refused():
    with pytest.raises(ValueError, match="no conversation template 'vicuna'"):
        llava_hf(SMALL, torch.float16, STAND_IN, "pad", "vicuna")


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: trained(model_type="unigram", normalization_rule_name="identity"), "not a BPE model"),
        (lambda: trained(model_type="bpe", normalization_rule_name="nmt_nfkc"), "without normalisation"),
        (lambda: STAND_IN + piece("<image>", -5.0, 1), "the piece '<image>' already"),
        (lambda: STAND_IN + piece("<pad>", -5.0, 3), "the piece '<pad>' already"),
        (lambda: STAND_IN + piece("my\u16a0", -5.0, 4), "user-defined or unused pieces.*my"),
        (lambda: STAND_IN + piece("ab\u16a0", -5.0, 1), "characters that are no pieces themselves"),
    ],
    ids=["unigram", "normalising", "image", "pad", "user-defined", "unreachable"],
)
def test_a_tokenizer_that_tokenizer_json_could_not_express_is_refused_there_only(model, reason):
    model = model()
    c = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, vocab=open_tokenizer(model).vocab_size))
    hf, original = exports(c, model=model)
    with pytest.raises(ValueError, match=reason):
        hf()
    assert original()["tokenizer.model"] == model


def test_a_trained_bpe_model_is_exported_as_it_encodes(tmp_path):
    model = trained(model_type="bpe", normalization_rule_name="identity")
    ours = open_tokenizer(model)
    c = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, vocab=ours.vocab_size))
    written(llava_hf(c, torch.float16, model, "pad", "v1"), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "the cat that had the hat", "tthhee  ccaatt"):
        assert theirs(text).input_ids == [1] + (ours.encode(" " + text) if text else [])
