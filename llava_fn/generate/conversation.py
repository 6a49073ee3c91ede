"""A conversation with an assistant: pictures, turns, and answers as text.

    a = load(ChatOptions((Path("llava-1.5-7b-hf"),)))
    chat = ask(Chat(), "What is shown?", [picture("cat.jpg", a)])
    for part in reply(a, chat, Decoding()):
        print(part.new, end="")
    chat = ask(part.chat, "And what colour is it?")

A Chat is a value, but for the tensors of its cache: only the newest Chat of a conversation may be continued.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from llava_fn.batch import IMAGE
from llava_fn.cache import Cache
from llava_fn.data import image, text
from llava_fn.data.templates import MARK, template_of
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.errors import BadRecord
from llava_fn.generate import decode
from llava_fn.generate.assistant import Assistant, vocabulary, with_stop
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Answer, PartialAnswer, Prompt
from llava_fn.kernels.transfer import to_device

KEPT = 256  # images that are not asked about now whose features are kept
WINDOW = 8  # tokens at the end of an answer whose text may still change, at most

Key = int | str  # of a position: the token, or the key of the picture


@dataclass(frozen=True)
class Picture:
    """pixels: uint8[3, image, image]. key: a digest of the pixels."""

    pixels: Tensor
    key: str


def picture(source: str | Path | bytes | Image.Image, a: Assistant, name: str | None = None) -> Picture:
    """A picture from a path, the bytes of a file, a data URL of base64, or an image open in Pillow.

    Raises BadRecord for what is no image, and for an image above image.MAX_PIXELS.
    """
    reading = a.form.image_reading
    if isinstance(source, Image.Image):
        img = image.to_rgb(source, name or "image", reading=reading)
    elif isinstance(source, str) and source.startswith("data:"):
        img = image.from_base64(source, name or "data URL", reading=reading)
    else:
        img = image.open_image(source, name, reading=reading)
    pixels = image.to_pixels(img, a.config.vision.image, a.form.image_mode, name or "image")
    return Picture(pixels, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())


@dataclass(frozen=True)
class Chat:
    """A conversation, and what is kept of its computation."""

    turns: tuple[tuple[str, str], ...] = ()  # ("human", text), ("gpt", text), ...
    pictures: tuple[Picture, ...] = ()  # in the order of their marks
    system: str | None = None  # instead of the template's own system prompt
    feats: Mapping[str, Tensor] = field(default_factory=dict)  # of pictures, key -> f[p, d]
    cache: Cache | None = None  # of one row
    cached: tuple[Key, ...] = ()  # the key of each position that the cache holds


def ask(chat: Chat, question: str, pictures: Sequence[Picture] = ()) -> Chat:
    """The conversation with one more question, its pictures where it has "<image>" or, if it has none, in front of it.

    Raises BadRecord if there are marks and their number is not that of the pictures.
    """
    marks = question.count(MARK)
    if marks and marks != len(pictures):
        raise BadRecord(f"{marks} {MARK} in the question but {len(pictures)} images; make them agree")
    if not marks:
        question = f"{MARK}\n" * len(pictures) + question if question.strip() else MARK * len(pictures)
    return replace(chat, turns=(*chat.turns, ("human", question)), pictures=(*chat.pictures, *pictures))


def undo(chat: Chat) -> Chat:
    """The conversation without the last question, its pictures and its answer; unchanged if there is no question."""
    questions = [i for i, (role, _) in enumerate(chat.turns) if role == "human"]
    if not questions:
        return chat
    marks = chat.turns[questions[-1]][1].count(MARK)
    return replace(chat, turns=chat.turns[: questions[-1]], pictures=chat.pictures[: len(chat.pictures) - marks])


def features(a: Assistant, pictures: Sequence[Picture], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """key -> f[p, d] of these pictures and of the newest others in `known`; only what is not in `known` is computed."""
    new = {s.key: s.pixels for s in pictures if s.key not in known}
    computed = {}
    if new:
        pixels = to_device(torch.stack(list(new.values())), a.model.embed.device)
        parts = decode.features(a.model, pixels).split(a.config.vision.patches)
        computed = dict(zip(new, parts, strict=True))
    wanted = {s.key for s in pictures}
    others = {key: f for key, f in known.items() if key not in wanted}
    return dict(list(others.items())[-KEPT:]) | {key: f for key, f in known.items() if key in wanted} | computed


def prompt(a: Assistant, chat: Chat, d: Decoding, goes_on: bool = False) -> tuple[Prompt, tuple[Key, ...]]:
    """The prompt of a conversation that ends with a question, or an answer that `goes_on`, and each position's key.

    chat: has the features of its pictures. Raises BadRecord if the numbers of marks and pictures differ, and if the
    context has no room for `d.tokens` more; nothing is ever cut.
    """
    template = template_of(a.form.template)
    if chat.system is not None:
        template = template.with_system(chat.system)
    ids = text.prompt(chat.turns, template, a.tokenizer, a.form.compat, goes_on)
    return prompt_of(a, ids, chat.pictures, chat.feats, d)


def prompt_of(
    a: Assistant, ids: Sequence[int], pictures: Sequence[Picture], feats: Mapping[str, Tensor], d: Decoding
) -> tuple[Prompt, tuple[Key, ...]]:
    """`prompt`, from the tokens of its text with IMAGE once for each picture. feats: of each picture."""
    if ids.count(IMAGE) != len(pictures):
        raise BadRecord(f"the prompt has {ids.count(IMAGE)} {MARK} but {len(pictures)} images; make them agree")
    patches, left = a.config.vision.patches, iter(pictures)
    keys = [key for i in ids for key in ([next(left).key] * patches if i == IMAGE else [i])]
    if len(keys) + d.tokens > a.context:
        raise BadRecord(
            f"the prompt has {len(keys)} tokens, {patches * len(pictures)} of them for {len(pictures)} "
            f"images; with tokens={d.tokens} for the answer that is over the context of {a.context}; "
            "shorten it, ask for fewer tokens, or begin a new conversation"
        )
    rows = torch.cat([a.model.embed[:0], *(feats[s.key] for s in pictures)])
    return Prompt(tuple(IMAGE if isinstance(key, str) else key for key in keys), rows), tuple(keys)


def text_of(tokenizer: Tokenizer, ids: Sequence[int], goes_on: bool) -> str:
    """The text of an answer; one that goes on from other text keeps the space in front."""
    if not goes_on:
        return tokenizer.decode(ids)
    return tokenizer.decode([*tokenizer.encode("."), *ids]).removeprefix(".")


@dataclass(frozen=True)
class GrowingText:
    """`text_of` an answer that grows, of which only the end is decoded anew: the bytes of a character come one by one.

    fixed: the text that no further token changes, with its space in front. window: the tokens behind it.
    """

    tokenizer: Tokenizer
    goes_on: bool = False
    fixed: str = ""
    window: tuple[int, ...] = ()
    tail: str = ""  # the text of the window

    @property
    def text(self) -> str:
        """Equal to text_of(tokenizer, ids, goes_on) of all tokens so far."""
        whole = self.fixed + self.tail
        return whole if self.goes_on else whole.removeprefix(" ")

    def grow(self, ids: Sequence[int]) -> GrowingText:
        """The text with more tokens."""
        grown = self
        for token in ids:
            grown = grown._with(token)
        return grown

    def _with(self, token: int) -> GrowingText:
        window = (*self.window, token)
        tail = text_of(self.tokenizer, window, True)
        if not tail.endswith("\ufffd"):  # which may be the first bytes of a character
            return replace(self, fixed=self.fixed + tail, window=(), tail="")
        if len(window) <= WINDOW:
            return replace(self, window=window, tail=tail)
        # bytes that are no characters: of the first four places, one is not inside a character
        starts = ((n, text_of(self.tokenizer, window[:n], True)) for n in range(1, 5))
        n, start = next((n, s) for n, s in starts if s + text_of(self.tokenizer, window[n:], True) == tail)
        return replace(self, fixed=self.fixed + start, window=window[n:], tail=tail[len(start) :])


def visible(answer: str, stop: Sequence[str], ended: bool) -> str:
    """The prefix of a growing answer that is safe to show: no partial UTF-8, no possible start of a stop text.

    Of an answer that has ended: all of it up to a stop text.
    """
    cut = min((answer.index(s) for s in stop if s in answer), default=None)
    if cut is not None or ended:
        return answer[:cut]
    answer = answer.rstrip("\ufffd")
    longest = max((n for s in stop for n in range(len(s)) if answer.endswith(s[:n])), default=0)
    return answer[: len(answer) - longest]


@dataclass(frozen=True)
class Reply:
    """An answer as far as it has come. new: the text since the last Reply. chat: the conversation with the answer."""

    new: str
    chat: Chat
    ended: bool = False


def reply(a: Assistant, chat: Chat, d: Decoding) -> Iterator[Reply]:
    """The answer to the last question, one Reply a token. Only tokens that the cache does not hold are computed.

    A caller may stop at any time and go on with the last `chat`. If it stops before the first Reply, the cache of the
    chat that it passed in is spoilt: go on without it. ValueError for beams or several samples.
    """
    if d.beams > 1 or d.samples > 1:
        raise ValueError("an answer that is shown as it grows has one sample and no beams; leave them out")
    d, known = with_stop(a, d), vocabulary(a)
    chat = replace(chat, feats=features(a, chat.pictures, chat.feats))
    question, keys = prompt(a, chat, d)
    size = decode.room(a.model, [question], d)
    cache = chat.cache.grown(size) if chat.cache else a.model.cache(1, size)
    state = decode.prefill(a.model, [question], cache, known, [common_prefix(keys[:-1], chat.cached)])
    before, row, grown = "", PartialAnswer(), GrowingText(a.tokenizer)
    steps = decode.steps(a.model, state, d, [d.seed])
    for t, ((token, *logprobs),) in enumerate(decode.on_host(steps)):
        cached = (*keys, *row.ids[:t])
        row = row.grow(int(token), logprobs, d, known)
        grown, ended = grown.grow(row.ids[t:]), row.ended or t + 1 == d.tokens
        answer = visible(grown.text, d.stop, ended)
        turns = (*chat.turns, ("gpt", answer.strip()))
        yield Reply(answer[len(before) :], replace(chat, turns=turns, cache=state.cache, cached=cached), ended)
        before = answer
        if ended:
            return


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest prefix that two sequences share."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared faster than items
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Text:
    """One answer as text. ids and logprobs: of its tokens, those of a stop text included. score: of a beam."""

    text: str
    ids: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] = ()
    score: float | None = None


def answers(a: Assistant, chats: Sequence[Chat], d: Decoding, seeds: Sequence[int] | None = None) -> list[list[Text]]:
    """`d.samples` answers to the last question of each conversation, in one batch. Missing features are computed."""
    known = features(a, [s for chat in chats for s in chat.pictures], {k: f for c in chats for k, f in c.feats.items()})
    chats = [replace(chat, feats=known) for chat in chats]
    return answers_to(a, [prompt(a, chat, d)[0] for chat in chats], d, seeds)


def answers_to(
    a: Assistant, prompts: Sequence[Prompt], d: Decoding, seeds: Sequence[int] | None = None
) -> list[list[Text]]:
    """`d.samples` answers to each prompt, in one batch."""
    d = with_stop(a, d)
    rows = decode.generate(a.model, prompts, d, vocabulary(a), seeds)
    return [[_text(a, r, d) for r in row] for row in rows]


def _text(a: Assistant, r: Answer, d: Decoding) -> Text:
    return Text(visible(a.tokenizer.decode(r.ids), d.stop, True), *(getattr(r, f.name) for f in dataclasses.fields(r)))
