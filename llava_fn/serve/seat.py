"""One answer of a request: what is asked for, how far it has come, and what each token adds. All on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from llava_fn.generate.conversation import GrowingText, Key, Picture, visible
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import PartialAnswer, Vocabulary
from llava_fn.serve.pages import Stored

AnswerName = tuple[str, int]  # of the HTTP request, and the number of the answer
Ranking = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, most likely first


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to write. ids and keys: the token id, and the conversation's key, of each position of the prompt.

    vocabulary: with what ends the answer. top: how many most likely tokens are told beside each chosen one. goes_on:
    whether the answer continues a text of the prompt.
    """

    name: AnswerName
    ids: tuple[int, ...]
    keys: tuple[Key, ...]
    pictures: tuple[Picture, ...]
    decoding: Decoding  # the template's stop text included; one sample, no beams
    vocabulary: Vocabulary
    top: int = 0
    goes_on: bool = False
    adapter: str = ""  # its name; "" for the base


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer. finish: "stop" or "length" at the end of the answer.

    logprobs and top: where requested, of each id and of the most likely tokens in its place, in nats under the model.
    """

    name: AnswerName
    new: str
    ids: tuple[int, ...] = ()  # the new token, unless it is one that ends answers
    logprobs: tuple[float, ...] = ()
    top: tuple[Ranking, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Seat:
    """A request in its slot. The device may be ahead of the host: it chooses tokens that the host has not read yet."""

    request: AnswerRequest
    turn: int  # seats with lower numbers came earlier
    filled: int  # positions of the prompt that the cache holds
    pages: tuple[int, ...]  # of the cache, for the prompt and the answer
    uniform: Tensor  # f32[tokens] on the host, a random number for each token
    text: GrowingText  # of the answer so far
    chosen: int = 0  # tokens that the device has chosen, or was told to choose
    read: int = 0  # of these
    row: PartialAnswer = PartialAnswer()
    shown: int = 0  # characters of the text that deltas have

    @property
    def left(self) -> int:
        """Positions of the prompt that are not prefilled yet."""
        return len(self.request.ids) - self.filled

    @property
    def decodes(self) -> bool:
        """Whether its prompt is prefilled and there are tokens to choose."""
        return 0 < self.chosen < self.request.decoding.tokens

    @property
    def held(self) -> int:
        """Positions that the cache holds: all chosen tokens but the last were appended."""
        return self.filled + max(self.chosen - 1, 0)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Of the positions that the cache holds, as far as the host knows them."""
        return (*self.request.keys[: self.filled], *self.row.ids)[: self.held]

    @property
    def stored(self) -> Stored:
        """What is in its pages."""
        return Stored(self.keys, self.pages)


def grow(seat: Seat, told: Sequence[float]) -> tuple[Seat | None, Delta]:
    """The seat after one more token, None if its answer has ended, and what the token adds to the answer.

    told: what the device says of it: the token, and where requested its log-probability, the most likely tokens and
    their log-probabilities.
    """
    request, d = seat.request, seat.request.decoding
    logprobs = tuple(told[1:2]) if d.logprobs else ()
    row = seat.row.grow(int(told[0]), logprobs, d, request.vocabulary)
    ended = row.ended or seat.read + 1 == d.tokens
    new = row.ids[len(seat.row.ids) :]
    text = seat.text.grow(new)
    shown = visible(text.text, d.stop, ended)
    top = (_ranking(told[2:], request.top),) if d.logprobs else ()
    finish = ("stop" if row.ended else "length") if ended else None
    delta = Delta(request.name, shown[seat.shown :], new, logprobs[: len(new)], top[: len(new)], finish)
    return None if ended else replace(seat, text=text, row=row, read=seat.read + 1, shown=len(shown)), delta


def _ranking(told: Sequence[float], top: int) -> Ranking:
    tokens, scores = told[: len(told) // 2], told[len(told) // 2 :]
    return tuple((int(token), score) for token, score in zip(tokens[:top], scores[:top], strict=True))
