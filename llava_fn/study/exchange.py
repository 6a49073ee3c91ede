"""A question, its pictures and an answer to it: what is studied, as one sequence of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from llava_fn import llama
from llava_fn.batch import IMAGE, Stream
from llava_fn.data import text
from llava_fn.data.templates import template_of
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.errors import BadRecord
from llava_fn.generate import conversation, decode
from llava_fn.generate.assistant import Assistant, vocabulary
from llava_fn.generate.conversation import Chat
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Prompt
from llava_fn.grad import scan

Span = tuple[str, int, int]  # a word: its text, the index of its first token in the answer, and that after its last


@dataclass(frozen=True)
class Exchange:
    """t positions, of which the last r each predict a token of the answer; the last token predicts nothing."""

    prompt: Prompt  # its t ids are the question's and the answer's without the last
    answer: tuple[int, ...]  # r tokens
    words: tuple[Span, ...]  # of the answer
    pixels: Tensor  # uint8[i, 3, h, w]

    @property
    def at(self) -> Tensor:
        """int64[i, p]: the positions of each image's patches."""
        return (torch.tensor(self.prompt.ids) == IMAGE).nonzero()[:, 0].view(len(self.pixels), -1)

    @property
    def said(self) -> list[str]:
        """The texts of the words."""
        return [word for word, _, _ in self.words]

    def per_word(self, x: Tensor) -> Tensor:
        """... r -> ... w: the sum over the tokens of each word."""
        return torch.stack([x[..., start:end].sum(-1) for _, start, end in self.words], -1)


@torch.no_grad()
def exchange(a: Assistant, chat: Chat, ids: Sequence[int]) -> Exchange:
    """chat: ends with the question; ids: of the answer's tokens. BadRecord if there is no image, or no word."""
    if not chat.pictures:
        raise BadRecord("there is no image to look at; give one")
    spans = words(a.tokenizer, ids)
    if not spans:
        raise BadRecord("the answer has no words, so nothing to look for; ask something else, or give an answer")
    chat = replace(chat, feats=conversation.features(a, chat.pictures, chat.feats))
    question, _ = conversation.prompt(a, chat, Decoding(tokens=len(ids)))
    pixels = torch.stack([picture.pixels for picture in chat.pictures])
    return Exchange(Prompt((*question.ids, *ids[:-1]), question.feats), tuple(ids), tuple(spans), pixels)


def answered(a: Assistant, chat: Chat, answer: str, tokens: int) -> tuple[str, Exchange]:
    """`exchange` with the given answer or, if it is empty, the model's own greedy one of at most `tokens`; its text."""
    if answer:
        return answer, exchange(a, chat, answer_ids(a, chat, answer))
    chat = replace(chat, feats=conversation.features(a, chat.pictures, chat.feats))
    ((best,),) = conversation.answers(a, [chat], Decoding(tokens=tokens))
    return best.text, exchange(a, chat, best.ids)


def words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """Each word of an answer; a space or a new line begins one."""
    starts, before = [], ""
    for j in range(len(ids)):
        text_so_far = tokenizer.decode(ids[: j + 1]).rstrip("\ufffd")  # a character may have several tokens
        if j == 0 or text_so_far[len(before) :][:1].isspace():
            starts.append(j)
        before = text_so_far
    spans = pairwise([*starts, len(ids)])
    texts = [(tokenizer.decode(ids[start:end]).strip(), start, end) for start, end in spans]
    return [span for span in texts if span[0]]


def answer_ids(a: Assistant, chat: Chat, answer: str) -> tuple[int, ...]:
    """The tokens of a given answer to the last question, as in training, without the token that ends it.

    BadRecord if they do not give the answer's words back, as where the text of a control token stands in it.
    """
    template = template_of(a.form.template)
    encoded = text.encode((*chat.turns, ("gpt", answer)), template, a.tokenizer, a.form.compat)
    ids = encoded.ids[len(text.prompt(chat.turns, template, a.tokenizer, a.form.compat)) :]
    ends = vocabulary(a).ends
    ids = tuple(ids[: next((j for j, i in enumerate(ids) if i in ends), len(ids))])
    if (back := a.tokenizer.decode(ids)).split() != answer.split():
        raise BadRecord(f"the answer {answer!r} is no text of this model, which reads its tokens as {back!r}")
    return ids


def logprobs(
    m: Model, x: Tensor, answer: Sequence[int], copies: int = 1, blocks: Callable = scan(llama.block)
) -> Tensor:
    """Log-probability in nats of each token of an answer, fp32[n, r], in n sequences of one length.

    x: (n t) d, the decoder's input of `copies` = n sequences, each a segment of the stream; the last r positions of
    each predict the answer. blocks: as of llama.decode.
    """
    hidden = llama.decode(m.params["llama"], x, stream(x, copies), m.config.llama, m.tp, blocks)
    hidden = hidden.unflatten(0, (copies, -1))[:, -len(answer) :].flatten(0, 1)
    targets = torch.tensor(answer, device=x.device).repeat(copies)
    return -llama.nll(m.params["llama"], hidden, targets, m.config.llama, m.tp).unflatten(0, (copies, -1))


def stream(x: Tensor, copies: int) -> Stream:
    """The stream of `copies` sequences of one length, every row of which is read. x: (n t) d."""
    return Stream.of([len(x) // copies] * copies).to(x.device)


def inputs(m: Model, e: Exchange) -> Tensor:
    """The decoder's input, f[t, d]."""
    return decode.embed(m, [e.prompt])


def in_picture(x: Tensor) -> Tensor:
    """... p -> ... rows columns, as the patches lie in a picture."""
    return x.unflatten(-1, (int(x.shape[-1] ** 0.5), -1))


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A token for a label: quoted where nothing of it can be seen."""
    if token in (tokenizer.bos, tokenizer.eos):
        return "BOS" if token == tokenizer.bos else "EOS"
    text = tokenizer.decode([token])
    return text if text.strip() and text.isprintable() else repr(text)
