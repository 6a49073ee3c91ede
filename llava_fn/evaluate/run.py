"""From questions to answers: which are left, in which batches, by which process, and the batches themselves.

Rows are answered in batches of similar length, rows that share their images one after another, so that the image tower
sees an image once. Images are read and decoded ahead by threads while the device works. A process knows from its rank
alone what it has to do, and never waits for another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from llava_fn.batch import IMAGE
from llava_fn.data import text
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.errors import BadRecord
from llava_fn.evaluate import folder, prompts
from llava_fn.evaluate.folder import Settings
from llava_fn.evaluate.prompts import Parts
from llava_fn.evaluate.records import Prediction, Question
from llava_fn.evaluate.tsv import Table
from llava_fn.generate import assistant
from llava_fn.generate.assistant import Assistant, Picture
from llava_fn.generate.options import Decoding


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it. ids: IMAGE once for each image. size: its tokens, image positions included."""

    question: Question
    ids: tuple[int, ...]
    size: int

    @property
    def images(self) -> int:
        """How many images it has."""
        return self.ids.count(IMAGE)


def parts(table: Table, s: Settings) -> dict[str, Parts]:
    """index -> prompt."""
    kind = table.dataset.kind
    return {
        q.index: prompts.parts(s.style, prompts.question_text(q, kind), len(table.pictures[q.index]))
        for q in table.questions
    }


def keys(table: Table, s: Settings, cut: Mapping[str, Parts]) -> dict[str, str]:
    """index -> the key of its answer. cut: the prompts."""
    return {q.index: folder.key(s, prompts.shown(cut[q.index]), q.images) for q in table.questions}


def ask(table: Table, s: Settings, cut: Mapping[str, Parts], tokenizer: Tokenizer, patches: int) -> list[Asked]:
    """Every question in the tokens of its prompt. cut: the prompts; patches: positions of an image."""
    compat, out = s.style.form.compat, []
    for q in table.questions:
        ids = text.pieces(cut[q.index], tokenizer, compat)
        out.append(Asked(q, tuple(ids), len(ids) + (patches - 1) * ids.count(IMAGE)))
    return out


def batches(asked: Sequence[Asked], s: Settings, batch: int, world: int) -> list[list[Asked]]:
    """What goes through the model together, in order; rank r of world takes every world-th from r on.

    A prompt that leaves less room in the context than an answer may need is a batch of its own, so that no other
    answer depends on it.
    """
    longest: dict[str, int] = {}
    for a in asked:
        longest[a.question.images] = max(a.size, longest.get(a.question.images, 0))
    order = sorted(asked, key=lambda a: (longest[a.question.images], a.question.images, a.size, a.question.row))
    roomy = [a for a in order if a.size + s.decoding.tokens <= s.context]
    tight = [[a] for a in order if a.size + s.decoding.tokens > s.context]
    size = max(1, min(batch, -(-len(roomy) // world)))
    return [roomy[i : i + size] for i in range(0, len(roomy), size)] + tight


@dataclass(frozen=True)
class Ready:
    """A batch with its pictures, and what is wrong with the questions that have none."""

    asked: tuple[Asked, ...]
    pictures: tuple[tuple[Picture, ...], ...]
    wrong: Mapping[str, str]  # index -> reason


@dataclass(frozen=True)
class Prepare:
    """Reads and decodes the images of a batch; those that several of its questions share, once."""

    table: Table
    a: Assistant

    def __call__(self, batch: Sequence[Asked]) -> Ready:
        asked, pictures, wrong = [], [], {}
        known: dict[str, tuple[Picture, ...]] = {}
        for one in batch:
            q = one.question
            try:
                _check_room(one, self.a)
                if q.images not in known:
                    content = enumerate(self.table.images(q), 1)
                    known[q.images] = tuple(assistant.picture(x, self.a, f"image {j}") for j, x in content)
                asked.append(one)
                pictures.append(known[q.images])
            except BadRecord as error:
                wrong[q.index] = str(error)
        return Ready(tuple(asked), tuple(pictures), wrong)


def _check_room(one: Asked, a: Assistant) -> None:
    if one.size >= a.context:
        raise BadRecord(
            f"the prompt has {one.size} tokens, {a.model.vision.patches * one.images} of them for {one.images} images, "
            f"which leaves no room for an answer in the context of {a.context}"
        )


def ahead(table: Table, a: Assistant, mine: Sequence[Sequence[Asked]], workers: int) -> Iterator[Ready]:
    """Batches in order, up to twice as many as there are workers made ready before they are wanted.

    The threads have ended when it ends: a thread that still runs at the end of Python can abort it.
    """
    prepare, waiting = Prepare(table, a), deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in mine:
            waiting.append(pool.submit(prepare, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def answer(a: Assistant, ready: Iterable[Ready], d: Decoding) -> Iterator[list[Prediction]]:
    """The predictions of each batch, of every question of it; features of the newest images are kept."""
    known: dict[str, Tensor] = {}
    began = time.monotonic()
    for batch in ready:
        known = assistant.features(a, [x for pictures in batch.pictures for x in pictures], known)
        said = _said(a, batch, known, d) if batch.asked else []
        now = time.monotonic()
        share = (now - began) / (len(batch.asked) + len(batch.wrong))
        failed = [Prediction(index, "", 0, 0.0, reason) for index, reason in batch.wrong.items()]
        yield [replace(p, seconds=share) for p in (*said, *failed)]
        began = now


def _said(a: Assistant, batch: Ready, known: Mapping[str, Tensor], d: Decoding) -> list[Prediction]:
    left = min(d.tokens, a.context - max(one.size for one in batch.asked))
    d, full = replace(d, tokens=left), left == d.tokens
    both = zip(batch.asked, batch.pictures, strict=True)
    rows = [assistant.laid_out(a, one.ids, pictures, known, d)[0] for one, pictures in both]
    out = []
    for one, (t, *_) in zip(batch.asked, assistant.answers_to(a, rows, d), strict=True):
        cut = "" if t.ended or full else f"the answer has not ended in the {left} tokens that the context leaves for it"
        out.append(Prediction(one.question.index, "" if cut else t.text.strip(), len(t.ids), 0.0, cut))
    return out
