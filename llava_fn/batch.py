"""A batch is one ragged stream of tokens: samples one after another, no padding, no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llava_fn.kernels import Segments
from llava_fn.kernels.transfer import to_device

IMAGE = -200  # stands for an image: once in a text, at each of its positions in a stream (LLaVA constants.py)


@dataclass(frozen=True)
class Sample:
    """One record, ready for the model. label[j]: whether the loss counts the prediction of token j.

    ids: image positions hold IMAGE, `patches` of them for each image. pixels: uint8[i, 3, image, image].
    """

    record: str
    ids: tuple[int, ...]
    label: tuple[bool, ...]
    pixels: Tensor


@dataclass(frozen=True)
class Stream:
    """Where samples stand in the stream and which rows are read after the last block."""

    segments: Segments
    positions: Tensor  # int64[t]: from 0 in each segment, or from the number of its tokens that a cache holds
    read_segments: Segments
    read: Tensor  # int64[r], rising: the last `read_segments.queries[j]` rows of segment j

    @staticmethod
    def of(lengths: Sequence[int], tails: Sequence[int] | None = None, held: Sequence[int] | None = None) -> Stream:
        """lengths: rows of each segment. tails: how many rows at its end are read; None for all.

        held: length of each segment's prefix that a cache holds already; None for none.
        """
        held = held if held is not None else [0] * len(lengths)
        keys = tuple(n + before for n, before in zip(lengths, held, strict=True))
        read_segments = Segments(tuple(tails if tails is not None else lengths), keys)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return Stream(
            Segments(tuple(lengths), keys),
            torch.cat([torch.arange(end - n, end) for n, end in zip(lengths, keys, strict=True)]),
            read_segments,
            torch.cat([torch.arange(end - n, end) for n, end in zip(read_segments.queries, ends, strict=True)]),
        )

    def to(self, device: torch.device) -> Stream:
        """The same stream with its tensors on `device`."""
        return Stream(
            self.segments.to(device), to_device(self.positions, device),
            self.read_segments.to(device), to_device(self.read, device),
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """t tokens, i images, p patches an image, r rows read, n labelled tokens."""

    records: tuple[str, ...]  # in the order of the stream
    stream: Stream
    ids: Tensor  # int64[t]
    pixels: Tensor  # uint8[i, 3, image, image]
    image_rows: Tensor  # int64[i * p]: where the features of the images go
    labelled: Tensor  # int64[n]: which of the rows read predict a labelled token
    targets: Tensor  # int64[n]: these tokens
    tokens: int  # t without padding

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {f.name: to_device(x, device) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, stream=self.stream.to(device), **tensors)


def collate(samples: Sequence[Sample], multiple: int = 1, image: int = 0) -> Batch:
    """Lay samples out as a stream, sorted by length: neighbours of one length share one dense attention call.

    multiple: padding, a last segment without labels, makes t and r multiples of it. image: pixels per side; with it
    `samples` may be empty, and the batch is padding alone. ValueError for an empty batch otherwise, and for a sample
    without a single label.
    """
    if not samples and not image:
        raise ValueError("a batch needs at least one sample")
    bare = [s.record for s in samples if not any(s.label[1:])]
    if bare:
        raise ValueError(f"records without a single labelled token: {', '.join(bare)}; remove them from the data")
    samples = sorted(samples, key=lambda s: (len(s.ids), s.label.index(True, 1)))
    lengths = [len(s.ids) for s in samples]
    tails = [len(s.ids) - s.label.index(True, 1) + 1 for s in samples]  # a row predicts the token after it
    tokens, (rows, read) = sum(lengths), _padding(sum(lengths), sum(tails), multiple)
    if rows:
        lengths, tails = [*lengths, rows], [*tails, read]
    ids = torch.tensor([t for s in samples for t in s.ids] + [0] * rows)
    label = torch.tensor([x for s in samples for x in (False, *s.label[1:])] + [False] * rows)
    stream = Stream.of(lengths, tails)
    follows = torch.cat([label[1:], torch.tensor([False])])  # a segment's first token is never labelled
    return Batch(
        records=tuple(s.record for s in samples),
        stream=stream,
        ids=ids,
        pixels=torch.cat([s.pixels for s in samples] or [torch.zeros(0, 3, image, image, dtype=torch.uint8)]),
        image_rows=(ids == IMAGE).nonzero()[:, 0],
        labelled=follows[stream.read].nonzero()[:, 0],
        targets=ids[label],
        tokens=tokens,
    )


def _padding(rows: int, read: int, multiple: int) -> tuple[int, int]:
    """The smallest padding segment, as (tokens, rows read), that makes both sums divide; (0, 0) if they do already."""
    if rows and not rows % multiple and not read % multiple:
        return 0, 0
    more = -rows % multiple or multiple
    last = -read % multiple or multiple
    return (more if more >= last else more + multiple), last
