"""The vocabulary of a folder: tokenizer.model, and what the JSON files beside it add to it or say of it.

Here a text is spelled with tokenizer.model alone, and answers end with its EOS. What another file adds is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_fn import fields
from llava_fn.data.templates import MARK
from llava_fn.data.tokenizer import SentencePiece, open_tokenizer
from llava_fn.fields import FREE, OTHER, Field, Table, free, inside, items, only
from llava_fn.weights.fast_tokenizer import PAD
from llava_fn.weights.hub import GENERATION

MODEL = "tokenizer.model"
_ADVICE = "with which answers begin and end here; give the tokenizer.model that the model was trained with"
Values = Mapping[str, Any]
PADDING = 256  # rows that a decoder may have beyond the tokenizer's; Hugging Face pads to multiples of 64 or 128
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_TEXT = Field(lambda v: isinstance(v, str) or (isinstance(v, Mapping) and isinstance(v.get("content"), str)),
              "it must be the text of a token")  # fmt: skip
_ID = Field(lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "it must be the id of a token")
_TOKEN: Table = {"content": fields.text(), OTHER: FREE}
SPECIAL: Table = dict.fromkeys(_NAMES, _TEXT) | free(  # special_tokens_map.json
    "additional_special_tokens cls_token mask_token sep_token image_token"
)
TOKENIZER: Table = {**SPECIAL} | free(  # tokenizer_config.json
    # how transformers finds, names and runs it
    "tokenizer_class processor_class backend is_local local_files_only name_or_path tokenizer_file vocab_file "
    "special_tokens_map_file use_fast from_slow trust_remote_code device_map init_inputs model_input_names "
    "extra_special_tokens model_specific_special_tokens "
    # how it spells around special tokens, pads, cuts and decodes: here LLaVA's way, see data/text.py
    "legacy add_prefix_space spaces_between_special_tokens clean_up_tokenization_spaces padding_side truncation_side "
    "model_max_length max_length stride truncation_strategy pad_to_multiple_of pad_token_type_id "
    # the prompt, which is an option here
    "chat_template use_default_system_prompt"
) | {
    "add_bos_token": only(True, None), "add_eos_token": only(False, None), "sp_model_kwargs": only({}, None),
    "split_special_tokens": only(False, None), "do_lower_case": only(False, None),
    "added_tokens_decoder": inside({OTHER: inside(_TOKEN)}),
}  # fmt: skip
ADDED: Table = {OTHER: _ID}  # added_tokens.json: text -> id
FAST: Table = {  # tokenizer.json, of which tokenizer.model is the source
    "added_tokens": items({"id": _ID, "content": fields.text(), OTHER: FREE}, []), OTHER: FREE,
}  # fmt: skip
TABLES = {
    "generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER, "special_tokens_map.json": SPECIAL,
    "added_tokens.json": ADDED, "tokenizer.json": FAST,
}  # fmt: skip


def read(folder: Path, stated: Values) -> bytes | None:
    """The bytes of the folder's tokenizer.model; None for a folder without one, whose other files are not read.

    stated: "bos_token_id" and "eos_token_id" of config.json. ValueError, with file, field and value, for a field that
    is not known, for added tokens other than llava-hf's `<image>` and `<pad>`, and for another BOS or EOS than
    tokenizer.model's.
    """
    if not (folder / MODEL).is_file():
        return None
    model = (folder / MODEL).read_bytes()
    fields.check_pointer(folder / MODEL, model)
    files = {name: fields.read(folder / name, fields.load(folder / name), table)
             for name, table in TABLES.items() if (folder / name).is_file()}  # fmt: skip
    try:
        tokenizer = SentencePiece(model)
    except ValueError as error:
        raise ValueError(f"{folder / MODEL}: {error}") from error
    _check_ends(folder, {"config.json": stated, **files}, tokenizer)
    _check_added(folder, files, tokenizer)
    return model


def rows(where: str, tokenizer: bytes, vocab: int) -> int:
    """The number of pieces: the rows of a decoder's vocabulary that are text. The rest, up to `PADDING`, is padding.

    ValueError for a tokenizer that is none, and for one that does not fit a decoder with `vocab` rows.
    """
    pieces = open_tokenizer(tokenizer).vocab_size
    if pieces > vocab:
        raise ValueError(f"{where}: the tokenizer has {pieces} pieces, the decoder {vocab}; give the decoder's own")
    if vocab - pieces > PADDING:
        raise ValueError(
            f"{where}: the decoder has {vocab} tokens and the tokenizer {pieces}, so that {vocab - pieces} could never "
            "be spelled; give the tokenizer that the decoder was trained with"
        )
    return pieces


def _check_ends(folder: Path, files: Mapping[str, Values], tokenizer: SentencePiece) -> None:
    """ValueError for a file that names another BOS or EOS, by its id or its text, than tokenizer.model."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    for file, values in files.items():
        for name, token in ids.items():
            text, number, piece = values.get(name), values.get(f"{name}_id"), tokenizer.piece(token)
            text = text["content"] if isinstance(text, Mapping) else text
            if text not in (None, "", piece):
                raise ValueError(f"{folder / file}: {name}={text!r}; {MODEL} has {piece!r}, {_ADVICE}")
            if number not in (None, token, [token]):
                raise ValueError(f"{folder / file}: {name}_id={number}; {MODEL} has {token}, {_ADVICE}")


def _added(files: Mapping[str, Values]) -> Iterator[tuple[str, str, int]]:
    """(file, text, id) of each added token."""
    for text, token in files.get("added_tokens.json", {}).items():
        yield "added_tokens.json", text, token
    for token, row in (files.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}).items():
        yield "tokenizer_config.json", row["content"], int(token) if token.isdecimal() else -1
    for row in files.get("tokenizer.json", {}).get("added_tokens", ()):
        yield "tokenizer.json", row["content"], row["id"]


def _check_added(folder: Path, files: Mapping[str, Values], tokenizer: SentencePiece) -> None:
    """ValueError names the tokens that tokenizer.model cannot spell, unless they are llava-hf's."""
    pads = [values.get("pad_token") for values in files.values()]
    pads = [pad["content"] if isinstance(pad, Mapping) else pad for pad in pads]
    foreign: dict[str, dict[str, int]] = {}
    for file, text, token in _added(files):
        known = 0 <= token < tokenizer.vocab_size and tokenizer.piece(token) == text
        if not known and not (token >= tokenizer.vocab_size and text in (MARK, PAD, *pads)):
            foreign.setdefault(file, {})[text] = token
    if foreign:
        rows = [f"{file}: {', '.join(f'{x!r} ({i})' for x, i in row.items())}" for file, row in foreign.items()]
        raise ValueError(
            f"{folder}: {MODEL}, which spells all text here, lacks tokens that other files add ({'; '.join(rows)}); if "
            "the model does without them, remove them from these files"
        )
