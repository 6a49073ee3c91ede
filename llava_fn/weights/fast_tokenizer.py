"""tokenizer.json, the format of the `tokenizers` library, from a sentencepiece model of Llama's kind."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_fn.data.templates import MARK
from llava_fn.data.tokenizer import SentencePiece

PAD = "<pad>"
_SPACE = "\u2581"  # sentencepiece's space
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.Type


@dataclass(frozen=True)
class Pieces:
    """A sentencepiece model: (text, score, type) of each piece in the order of ids, and the ids of special pieces."""

    entries: tuple[tuple[str, float, int], ...]
    unk: int
    bos: int
    eos: int
    plain: bool  # BPE without normalisation

    @property
    def names(self) -> dict[str, str]:
        """The texts of the special pieces by their names in HF's configs."""
        return {f"{name}_token": self.entries[getattr(self, name)][0] for name in ("bos", "eos", "unk")}

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Id -> HF's AddedToken of each special piece, and of `<image>` and `<pad>`, which follow the vocabulary."""
        size, flags = len(self.entries), dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        texts = {i: self.entries[i][0] for i in sorted((self.unk, self.bos, self.eos))} | {size: MARK, size + 1: PAD}
        return {i: {"content": text, **flags, "special": True} for i, text in texts.items()}


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 128:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: an int, or bytes that are not decoded further."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _piece(message: bytes) -> tuple[str, float, int]:
    values = dict(_fields(message))
    return values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, _NORMAL)


def parse(model: bytes, size: int) -> Pieces:
    """The content of a tokenizer.model (sentencepiece_model.proto). ValueError unless it has `size` pieces."""
    tokenizer = SentencePiece(model)
    if tokenizer.vocab_size != size:
        raise ValueError(f"tokenizer.model has {tokenizer.vocab_size} pieces, but llama.vocab={size}; make them agree")
    fields = list(_fields(model))
    entries = tuple(_piece(value) for number, value in fields if number == 1)
    unknown = next(i for i, (_, _, kind) in enumerate(entries) if kind == _UNKNOWN)
    # Protobuf merges the occurrences of a message field by concatenation.
    trainer, normalizer = (dict(_fields(b"".join(v for n, v in fields if n == number))) for number in (2, 3))
    plain = trainer.get(3) == _BPE and not normalizer.get(2)
    return Pieces(entries, unknown, tokenizer.bos, tokenizer.eos, plain)


def _check(pieces: Pieces) -> None:
    """ValueError for pieces that `tokenizer_json` cannot express."""
    if not pieces.plain:
        raise ValueError("tokenizer.model is not a BPE model without normalisation, as Llama's is")
    texts = {text for text, _, _ in pieces.entries}
    if taken := sorted(texts & {MARK, PAD}):
        raise ValueError(f"tokenizer.model has the piece {taken[0]!r} already, which the llava-hf layout adds")
    if odd := [text for text, _, kind in pieces.entries if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]:
        raise ValueError(f"tokenizer.model has user-defined or unused pieces, which are not supported: {odd[:5]}")
    if missing := sorted(set("".join(text for text, _, kind in pieces.entries if kind == _NORMAL)) - texts):
        raise ValueError(f"tokenizer.model has pieces with characters that are no pieces themselves: {missing[:5]}")


def _merges(pieces: Pieces) -> list[str]:
    """The merges of `tokenizers`' BPE, the first to apply first: every pair of pieces that makes a piece.

    Sentencepiece merges by score, and equal scores from left to right. In Llama's model only runs of spaces have equal
    scores; of their pairs, the leftmost is the one with the longest second piece.
    """
    scores = {text: score for text, score, kind in pieces.entries if kind == _NORMAL}
    pairs = [
        (score, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1])))
    return [f"{left} {right}" for _, left, right in pairs]


def tokenizer_json(pieces: Pieces) -> bytes:
    """tokenizer.json, which transformers 4 and 5 prefer to tokenizer.model.

    Without it transformers 5 needs protobuf, does not put a space before a text, and merges runs of spaces too early.
    ValueError unless the model is BPE with identity normalisation and has plain pieces only.
    """
    _check(pieces)
    bos = pieces.names["bos_token"]
    first, second = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
    begin, again = ({"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1))
    decoders = (
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    )  # fmt: skip
    value = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in pieces.added_tokens().items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, again, second],
            "special_tokens": {bos: {"id": bos, "ids": [pieces.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": pieces.names["unk_token"], "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "vocab": {text: i for i, (text, _, _) in enumerate(pieces.entries)}, "merges": _merges(pieces),
        },
    }  # fmt: skip
    return json.dumps(value, ensure_ascii=False).encode()
