"""From a request's JSON, in OpenAI's form, to the answers that it asks for, or to the reason why it is refused."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_fn.data import text
from llava_fn.data.templates import MARK
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation
from llava_fn.generate.assistant import Assistant, vocabulary, with_stop
from llava_fn.generate.conversation import Chat
from llava_fn.generate.family import Family
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Vocabulary
from llava_fn.serve import fields, messages
from llava_fn.serve.fields import Fields
from llava_fn.serve.options import Limits
from llava_fn.serve.refused import Refused
from llava_fn.serve.seat import AnswerRequest

COMPLETION_TOKENS = 16  # of a text completion without max_tokens, as in OpenAI's API


@dataclass(frozen=True)
class Offer:
    """What a server has for requests. name: of the base. strict: whether it refuses fields that it does not know.

    room: tokens of its cache.
    """

    family: Family
    name: str
    limits: Limits
    strict: bool = False
    room: float = math.inf

    def adapter(self, wanted: str) -> str:
        """The adapter that a model's name means; "" for the base. Raises Refused."""
        if wanted != self.name and wanted not in self.family.adapters:
            names = ", ".join(map(repr, (self.name, *self.family.adapters)))
            raise Refused(404, f"no model {wanted!r}; this server has {names}", "model", "model_not_found")
        return "" if wanted == self.name else wanted


@dataclass(frozen=True)
class Asked:
    """What a request asks for: `answers`, sample by sample of each prompt.

    usage: whether a stream ends with a chunk that counts tokens. model: as the request names it. unknown: its fields
    that nobody here knows.
    """

    answers: tuple[AnswerRequest, ...]
    prompts: int
    stream: bool
    usage: bool
    model: str
    unknown: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the request, in each of its answers."""
        return self.answers[0].name[0]

    @property
    def distinct(self) -> tuple[AnswerRequest, ...]:
        """One answer of each prompt."""
        return self.answers[:: len(self.answers) // self.prompts]


def chat(body: bytes, o: Offer, name: str) -> Asked:
    """What the body of a chat request asks for. name: the request's. Raises Refused."""
    values, unknown = fields.request(body, fields.CHAT)
    adapter = o.adapter(values.model)
    a = o.family.member(adapter)
    if values.top_logprobs and not values.logprobs:
        raise Refused(400, "top_logprobs goes with logprobs: true; give both", "top_logprobs")
    _check_samples(values, o.limits)
    tokens = _length(values, o.limits)
    try:
        read = messages.read(values.messages, o.limits)
        unknown += [f"messages.{field}" for message in read for field in message.unknown]
        _check_unknown(unknown, o)
        whole = messages.chat_of(read, a, o.limits)
        goes_on = _continues(values, whole)
        # the engine computes the features
        whole = replace(whole, feats={p.key: a.model.embed[:0] for p in whole.pictures})
        prompt, keys = conversation.prompt(a, whole, Decoding(tokens=tokens or 1), goes_on)
        _check_room(len(keys), o.limits)
    except BadRecord as error:
        raise Refused(400, str(error), "messages") from error
    d = _decoding(values, tokens or _most(len(keys), a, o), bool(values.logprobs))
    answer = AnswerRequest(
        (name, 0), prompt.ids, keys, whole.pictures, with_stop(a, d), vocabulary(a), values.top_logprobs, goes_on
    )
    return _asked([_of(answer, adapter)], values, unknown)


def completion(body: bytes, o: Offer, name: str) -> Asked:
    """What the body of a request for text completions asks for: prompts without a template. Raises Refused."""
    values, unknown = fields.request(body, fields.COMPLETION)
    adapter = o.adapter(values.model)
    a = o.family.member(adapter)
    _check_unknown(unknown, o)
    _check_samples(values, o.limits)
    tokens = _length(values, o.limits) or min(COMPLETION_TOKENS, o.limits.tokens)
    d = _decoding(values, tokens, values.logprobs is not None)
    answers = []
    for prompt in values.prompt:
        try:
            _, keys = conversation.prompt_of(a, _ids(prompt, a, o.limits), (), {}, d)
            _check_room(len(keys), o.limits)
        except BadRecord as error:
            raise Refused(400, str(error), "prompt") from error
        ids = tuple(key for key in keys if isinstance(key, int))
        known = Vocabulary.of(a.tokenizer)
        answer = AnswerRequest((name, 0), ids, keys, (), d, known, int(values.logprobs or 0), goes_on=True)
        answers.append(_of(answer, adapter))
    return _asked(answers, values, unknown)


def _ids(prompt: str | tuple[int, ...], a: Assistant, limits: Limits) -> Sequence[int]:
    """The tokens of a text, with BOS in front, or the given ones. Raises BadRecord."""
    if isinstance(prompt, str):
        if MARK in prompt:
            raise BadRecord(
                f"a prompt holds {MARK!r}, but completions are of text; send images to /v1/chat/completions"
            )
        messages.check_text([prompt], limits)
        return text.raw(prompt, a.tokenizer, a.form.compat)
    for token in prompt:
        if not 0 <= token < a.tokenizer.vocab_size:
            raise BadRecord(f"token {token} is outside the vocabulary of {a.tokenizer.vocab_size}")
    return prompt


def _asked(answers: Sequence[AnswerRequest], values: Fields, unknown: Sequence[str]) -> Asked:
    """The request for `n` samples of each of these answers."""
    if values.stream_options is not None and not values.stream:
        raise Refused(400, "stream_options goes with stream; leave it out", "stream_options")
    samples = []
    for answer in answers:
        for j in range(values.n):
            d = replace(answer.decoding, seed=(answer.decoding.seed + j) % 2**64)
            samples.append(replace(answer, name=(answer.name[0], len(samples)), decoding=d))
    usage = bool((values.stream_options or {}).get("include_usage"))
    return Asked(tuple(samples), len(answers), values.stream, usage, values.model, tuple(dict.fromkeys(unknown)))


def _of(answer: AnswerRequest, adapter: str) -> AnswerRequest:
    """An answer by an adapter. Its keys and its pictures' keys tell its features and its cache from those of others."""
    if not adapter:
        return answer
    tag = f"{adapter}:"
    keys = [tag + key if isinstance(key, str) else key for key in answer.keys]
    pictures = tuple(replace(p, key=tag + p.key) for p in answer.pictures)
    return replace(answer, adapter=adapter, keys=(f"{tag}{keys[0]}", *keys[1:]), pictures=pictures)


def _check_unknown(unknown: Sequence[str], o: Offer) -> None:
    if unknown and o.strict:
        raise Refused(400, f"unknown field {unknown[0]!r}; this server runs with --strict", unknown[0])
    if sum(map(len, unknown)) > fields.MOST_UNKNOWN:
        raise Refused(400, f"{len(unknown)} unknown fields, the first {fields.short(unknown[0])}; leave them out")


def _check_samples(values: Fields, limits: Limits) -> None:
    prompts = max(1, len(values.prompt))
    if values.n * prompts > limits.samples:
        what = f"n={values.n}" + (f" for {prompts} prompts" if prompts > 1 else "")
        raise Refused(400, f"{what}: this server gives at most {limits.samples} answers to a request", "n")
    if values.n > 1 and values.temperature == 0:
        raise Refused(400, f"n={values.n} without a temperature gives equal answers; leave one of them out", "n")


def _check_room(tokens: int, limits: Limits) -> None:
    if tokens > limits.prompt:
        raise BadRecord(f"the prompt has {tokens} tokens, over this server's limit of {limits.prompt}; shorten it")


def _most(prompt: int, a: Assistant, o: Offer) -> int:
    """The tokens of an answer for which there is room behind a prompt of so many."""
    return int(max(1, min(o.limits.tokens, a.context - prompt, o.room - prompt)))


def _continues(values: Fields, chat: Chat) -> bool:
    """Whether the answer continues the last message, which it does if that is an assistant's.

    Templates have no place for two answers in a row. Raises Refused if the request asks for the opposite.
    """
    answered = bool(chat.turns) and chat.turns[-1][0] == "gpt"
    for name, opposite in (("continue_final_message", not answered), ("add_generation_prompt", answered)):
        if getattr(values, name) is opposite:
            last = "an assistant's message, which is continued" if answered else "no assistant's message"
            raise Refused(400, f"{name} must be {str(not opposite).lower()}: the last one is {last}", name)
    return answered


def _length(values: Fields, limits: Limits) -> int | None:
    """The limit of tokens that the request sets, if any."""
    given = {name: getattr(values, name) for name in ("max_tokens", "max_completion_tokens") if getattr(values, name)}
    if len(set(given.values())) > 1:
        raise Refused(400, "max_tokens and max_completion_tokens are one and the same; give one", "max_tokens")
    for name, tokens in given.items():
        if tokens > limits.tokens:
            raise Refused(400, f"{name}={tokens}: this server writes at most {limits.tokens}", name)
    return next(iter(given.values()), None)


def _decoding(values: Fields, tokens: int, logprobs: bool) -> Decoding:
    """The options of one answer. Without a temperature there is nothing to sample from, however narrow."""
    narrow = {"top_k": max(values.top_k, 0), "top_p": values.top_p, "min_p": values.min_p} if values.temperature else {}
    seed = values.seed % 2**64 if values.seed != -1 else secrets.randbelow(2**62)
    return Decoding(
        tokens=tokens, temperature=values.temperature, repetition_penalty=values.repetition_penalty,
        seed=seed, stop=values.stop, logprobs=logprobs, **narrow,
    )  # fmt: skip
