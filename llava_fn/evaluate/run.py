"""From questions to answers: prompts in tokens, batches, and each process's share of them.

A batch holds prompts of similar length. Rows that share images follow each other, so that the image tower sees each
image once. Threads read and decode images ahead while the device works. A process knows its share from its rank alone,
and never waits for another.
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
from llava_fn.generate import conversation
from llava_fn.generate.assistant import Assistant
from llava_fn.generate.conversation import Picture
from llava_fn.generate.options import Decoding


@dataclass(frozen=True)
class Query:
    """A question in tokens. ids: IMAGE once for each image. size: its tokens, image positions included."""

    question: Question
    ids: tuple[int, ...]
    size: int

    @property
    def images(self) -> int:
        """The number of its images."""
        return self.ids.count(IMAGE)


def parts(table: Table, s: Settings) -> dict[str, Parts]:
    """index -> prompt, cut at its images."""
    kind = table.dataset.kind
    return {
        q.index: prompts.parts(s.style, prompts.question_text(q, kind), len(table.pictures[q.index]))
        for q in table.questions
    }


def keys(table: Table, s: Settings, cut: Mapping[str, Parts]) -> dict[str, str]:
    """index -> the key of its answer. cut: prompts by index."""
    return {q.index: folder.key(s, prompts.shown(cut[q.index]), q.images) for q in table.questions}


def queries(table: Table, s: Settings, cut: Mapping[str, Parts], tokenizer: Tokenizer, patches: int) -> list[Query]:
    """Every question in the tokens of its prompt. cut: prompts by index; patches: image positions of one image."""
    compat, out = s.style.form.compat, []
    for q in table.questions:
        ids = text.pieces(cut[q.index], tokenizer, compat)
        out.append(Query(q, tuple(ids), len(ids) + (patches - 1) * ids.count(IMAGE)))
    return out


def batches(queries: Sequence[Query], s: Settings, batch: int, world: int) -> list[list[Query]]:
    """Batches of at most `batch` queries, in order. Rank r takes the batches r, r + world, r + 2 world, ...

    A prompt that leaves less room in the context than an answer may need is a batch of its own, so that no other
    answer depends on it.
    """
    longest: dict[str, int] = {}
    for x in queries:
        longest[x.question.images] = max(x.size, longest.get(x.question.images, 0))
    order = sorted(queries, key=lambda x: (longest[x.question.images], x.question.images, x.size, x.question.row))
    roomy = [x for x in order if x.size + s.decoding.tokens <= s.context]
    tight = [[x] for x in order if x.size + s.decoding.tokens > s.context]
    size = max(1, min(batch, -(-len(roomy) // world)))
    return [roomy[i : i + size] for i in range(0, len(roomy), size)] + tight


@dataclass(frozen=True)
class ReadyBatch:
    """A batch with its pictures in memory. errors: index -> why a question of the batch cannot be asked."""

    queries: tuple[Query, ...]
    pictures: tuple[tuple[Picture, ...], ...]  # of each query
    errors: Mapping[str, str]


@dataclass(frozen=True)
class ImageReader:
    """Reads and decodes the images of a batch; images that several of its questions share, once."""

    table: Table
    a: Assistant

    def __call__(self, batch: Sequence[Query]) -> ReadyBatch:
        queries, pictures, errors = [], [], {}
        read: dict[str, tuple[Picture, ...]] = {}
        for query in batch:
            q = query.question
            try:
                _check_room(query, self.a)
                if q.images not in read:
                    content = enumerate(self.table.images(q), 1)
                    read[q.images] = tuple(conversation.picture(x, self.a, f"image {j}") for j, x in content)
                queries.append(query)
                pictures.append(read[q.images])
            except BadRecord as error:
                errors[q.index] = str(error)
        return ReadyBatch(tuple(queries), tuple(pictures), errors)


def _check_room(query: Query, a: Assistant) -> None:
    if query.size >= a.context:
        raise BadRecord(
            f"the prompt has {query.size} tokens, {a.config.vision.patches * query.images} of them for {query.images} "
            f"images, which leaves no room for an answer in the context of {a.context}"
        )


def ahead(table: Table, a: Assistant, batches: Iterable[Sequence[Query]], workers: int) -> Iterator[ReadyBatch]:
    """The batches in order; threads prefetch the images of up to twice as many batches as there are workers.

    The threads have ended when the iterator ends: a thread that still runs at the end of Python can abort it.
    """
    reader, futures = ImageReader(table, a), deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            futures.append(pool.submit(reader, batch))
            if len(futures) > 2 * workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def answer(a: Assistant, batches: Iterable[ReadyBatch], d: Decoding) -> Iterator[list[Prediction]]:
    """The answers to each batch, errors last, each with its share of the batch's time. Features of images are kept."""
    features: dict[str, Tensor] = {}
    start = time.monotonic()
    for batch in batches:
        features = conversation.features(a, [x for pictures in batch.pictures for x in pictures], features)
        answers = _answers(a, batch, features, d) if batch.queries else []
        end = time.monotonic()
        share = (end - start) / (len(batch.queries) + len(batch.errors))
        failed = [Prediction(index, "", 0, 0.0, reason) for index, reason in batch.errors.items()]
        yield [replace(p, seconds=share) for p in (*answers, *failed)]
        start = end


def _answers(a: Assistant, batch: ReadyBatch, features: Mapping[str, Tensor], d: Decoding) -> list[Prediction]:
    room = min(d.tokens, a.context - max(query.size for query in batch.queries))
    d, full = replace(d, tokens=room), room == d.tokens
    pairs = zip(batch.queries, batch.pictures, strict=True)
    rows = [conversation.prompt_of(a, query.ids, pictures, features, d)[0] for query, pictures in pairs]
    out = []
    for query, (t, *_) in zip(batch.queries, conversation.answers_to(a, rows, d), strict=True):
        error = ""
        if not t.ended and not full:
            error = f"the answer has not ended in the {room} tokens that the context leaves for it"
        out.append(Prediction(query.question.index, "" if error else t.text.strip(), len(t.ids), 0.0, error))
    return out
