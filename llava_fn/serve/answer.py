"""Answers in OpenAI's forms, whole and in pieces: of chat, and of text completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llava_fn.data.tokenizer import Tokenizer
from llava_fn.generate.conversation import text_of
from llava_fn.serve.ask import Asked
from llava_fn.serve.seat import Delta


@dataclass(frozen=True)
class ApiForm:
    """How an API writes answers.

    prefix: of a request's name. whole, chunk: what its objects are called. choice: an answer from its index, its
    deltas and its logprobs. opening: what a stream begins each answer with. pieces: a delta in choices of a stream.
    logprobs: of deltas behind so many characters.
    """

    path: str
    prefix: str
    whole: str
    chunk: str
    choice: Callable[[int, Sequence[Delta], dict | None], dict]
    opening: Callable[[int], list[dict]]
    pieces: Callable[[Delta, dict | None], list[dict]]
    logprobs: Callable[[Tokenizer, Sequence[Delta], int], dict]


def head(asked: Asked, kind: str) -> dict:
    """What every object of a request begins with."""
    return {"id": asked.name, "object": kind, "created": int(time.time()), "model": asked.model}


def usage(asked: Asked, tokens: int) -> dict:
    """How many tokens the prompts and the answers have."""
    prompt = sum(len(answer.ids) for answer in asked.distinct)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def whole(form: ApiForm, tokenizer: Tokenizer, asked: Asked, deltas: Sequence[Sequence[Delta]]) -> dict:
    """One object with all answers."""
    choices = []
    for j, answer in enumerate(deltas):
        wanted = asked.answers[j].decoding.logprobs
        choices.append(form.choice(j, answer, form.logprobs(tokenizer, answer, 0) if wanted else None))
    tokens = sum(len(delta.ids) for answer in deltas for delta in answer)
    return head(asked, form.whole) | {"choices": choices, "usage": usage(asked, tokens)}


def pieces(form: ApiForm, tokenizer: Tokenizer, asked: Asked, delta: Delta, offset: int) -> list[dict]:
    """The choices that a delta adds to a stream. offset: characters of its answer's tokens so far."""
    wanted = asked.answers[delta.name[1]].decoding.logprobs and delta.ids
    return form.pieces(delta, form.logprobs(tokenizer, [delta], offset) if wanted else None)


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: with its space, and control tokens by their names. U+FFFD is a part of a character."""
    control = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    return control[token] if token in control else text_of(tokenizer, [token], True)


def _tokens(deltas: Sequence[Delta]) -> Iterator[tuple[int, float, Sequence[tuple[int, float]]]]:
    """Each token, its log-probability, and the most likely tokens in its place; those of a stop text included."""
    for delta in deltas:
        yield from zip(delta.ids, delta.logprobs, delta.top, strict=True)


def _chat_logprobs(tokenizer: Tokenizer, deltas: Sequence[Delta], offset: int) -> dict:
    """In nats. bytes: null for a token that is part of a character."""

    def entry(token: int, logprob: float) -> dict:
        text = spelled(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [
        entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in top]}
        for token, logprob, top in _tokens(deltas)
    ]
    return {"content": content, "refusal": None}


def _chat_choice(index: int, deltas: Sequence[Delta], logprobs: dict | None) -> dict:
    message = {"role": "assistant", "content": "".join(delta.new for delta in deltas), "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": deltas[-1].finish}


def _chat_piece(index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _chat_opening(index: int) -> list[dict]:
    return [_chat_piece(index, {"role": "assistant", "content": ""})]


def _chat_pieces(delta: Delta, logprobs: dict | None) -> list[dict]:
    index = delta.name[1]
    new = [_chat_piece(index, {"content": delta.new}, logprobs)] if delta.new or logprobs else []
    return new + ([_chat_piece(index, {}, finish=delta.finish)] if delta.finish else [])


def _text_logprobs(tokenizer: Tokenizer, deltas: Sequence[Delta], offset: int) -> dict:
    """In nats. A token that is part of a character is token_id:ID, so that no two have one name."""

    def name(token: int) -> str:
        text = spelled(tokenizer, token)
        return f"token_id:{token}" if "\ufffd" in text else text

    found = list(_tokens(deltas))
    lengths = [len(spelled(tokenizer, token)) for token, _, _ in found]
    return {
        "tokens": [name(token) for token, _, _ in found],
        "token_logprobs": [logprob for _, logprob, _ in found],
        "top_logprobs": [{name(t): p for t, p in ((token, logprob), *top)} for token, logprob, top in found],
        "text_offset": list(accumulate(lengths, initial=offset))[:-1],
    }


def _text_choice(index: int, deltas: Sequence[Delta], logprobs: dict | None) -> dict:
    text = "".join(delta.new for delta in deltas)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": deltas[-1].finish}


def _text_pieces(delta: Delta, logprobs: dict | None) -> list[dict]:
    return [_text_choice(delta.name[1], [delta], logprobs)] if delta.new or logprobs or delta.finish else []


CHAT = ApiForm(
    "chat/completions", "chatcmpl-", "chat.completion", "chat.completion.chunk",
    _chat_choice, _chat_opening, _chat_pieces, _chat_logprobs,
)  # fmt: skip
COMPLETION = ApiForm(
    "completions", "cmpl-", "text_completion", "text_completion",
    _text_choice, lambda index: [], _text_pieces, _text_logprobs,
)  # fmt: skip
