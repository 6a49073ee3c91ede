"""Tokenizers: what the package asks of one, and sentencepiece, the kind of the Llama family.

`open_tokenizer` alone chooses the kind: another tokenizer is a class like `SentencePiece` and a case there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import sentencepiece

from llava_fn.batch import IMAGE
from llava_fn.errors import BadRecord

_SPACE = "\u2581"  # how sentencepiece writes a space
# The protobuf message ModelProto{normalizer_spec{add_dummy_prefix: false}}. Protobuf merges concatenated messages, so
# these bytes behind a model switch its dummy prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer(Protocol):
    """A vocabulary, from text to ids and back. It pickles, because worker processes hold one."""

    @property
    def model(self) -> bytes:
        """The content of its file, tokenizer.model of a checkpoint."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        ...

    @property
    def bos(self) -> int:
        """Id of the token that begins a sequence."""
        ...

    @property
    def eos(self) -> int:
        """Id of the token that ends an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text` exactly as given: no BOS, no space in front, never a control token.

        Raises BadRecord for text that is not valid Unicode.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens and without one leading space, the one that begins a span.

        Raises ValueError for an id outside the vocabulary, such as `IMAGE`.
        """
        ...

    def encode_stripped(self, text: str) -> list[int]:
        """The ids of `text` where it follows a control token in transformers 4.31 with legacy=False.

        There a space is put in front, and taken off the first piece again as a string, unless `text` begins with a
        space itself. What is left of the piece may be no piece: the unknown token.
        """
        ...


def open_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer whose file holds these bytes. ValueError if they are of no kind that is known."""
    return SentencePiece(content)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the file `path`; ValueError names the file if it cannot be used."""
    try:
        return open_tokenizer(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class SentencePiece:
    """A sentencepiece model, held as the bytes of its file; it pickles as those bytes.

    Raises ValueError if the bytes are no such model, or if it has no BOS, EOS or byte fallback, or drops spaces.
    """

    model: bytes = field(repr=False)
    _processor: sentencepiece.SentencePieceProcessor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=self.model + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(
                f"not a sentencepiece model (it begins with {self.model[:24]!r}). Give the tokenizer.model file of the"
                " checkpoint; tokenizer.json, tiktoken files and git-lfs pointers are something else"
            ) from error
        _check_model(processor)
        object.__setattr__(self, "_processor", processor)

    def __reduce__(self) -> tuple[type[SentencePiece], tuple[bytes]]:
        return SentencePiece, (self.model,)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos(self) -> int:
        return self._processor.bos_id()

    @property
    def eos(self) -> int:
        return self._processor.eos_id()

    def piece(self, token: int) -> str:
        """The text of a piece, as it stands in the file. IndexError for an id outside the vocabulary."""
        return self._processor.id_to_piece(token)

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"text is not valid Unicode ({error}); repair it where it was written") from error
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        for i, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                what = "stands for an image" if token == IMAGE else f"is outside the vocabulary of {self.vocab_size}"
                raise ValueError(f"cannot decode: id {token} at position {i} {what}; decode the text around it")
        return self._processor.decode([int(token) for token in ids]).removeprefix(" ")

    def encode_stripped(self, text: str) -> list[int]:
        ids = self.encode(" " + text)
        if text.startswith((" ", _SPACE)):
            return ids
        first = self._processor.id_to_piece(ids[0])[1:]
        return ([self._processor.piece_to_id(first)] if first else []) + ids[1:]


def _check_model(processor: sentencepiece.SentencePieceProcessor) -> None:
    try:
        processor.id_to_piece(list(range(processor.vocab_size())))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the sentencepiece model has a piece that is no UTF-8 ({error}); get the file again"
        ) from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError("the sentencepiece model has no BOS or no EOS token, which every template needs")
    if processor.unk_id() in processor.encode("\U0010ffff"):
        raise ValueError("the sentencepiece model has no byte fallback: it would replace characters that it lacks")
    if processor.decode(processor.encode(" a  b ")) != " a  b ":
        raise ValueError("the sentencepiece model drops or merges spaces; a model of the Llama family keeps them")
