"""A batch is one ragged stream of tokens: samples one after another, no padding, no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llava_fn.kernels import Segments
from llava_fn.text import IMAGE


@dataclass(frozen=True)
class Sample:
    """One record, ready for the model. label[j] says that token j is to be predicted (from those before it).

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
    positions: Tensor  # int64[t], from 0 in each segment, or from what a cache holds of it
    read_segments: Segments
    read: Tensor  # int64[r], rising: the last `read_segments.queries[j]` rows of segment j

    @staticmethod
    def of(lengths: Sequence[int], tails: Sequence[int] | None = None, held: Sequence[int] | None = None) -> Stream:
        """lengths: rows of each segment; tails: how many at its end are read, or None for all.

        held: tokens of each segment that a cache holds already and that stand before its rows; None for none.
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
        return replace(self, positions=self.positions.to(device), read=self.read.to(device))


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

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {f.name: v.to(device) for f in fields(self) if hasattr(v := getattr(self, f.name), "to")}
        return replace(self, **moved)


def collate(samples: Sequence[Sample]) -> Batch:
    """Lay samples out as a stream, sorted by length: neighbours of one length share one dense attention call.

    ValueError on no samples, and on a sample without a label, which nothing could be learned from.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    bare = [s.record for s in samples if not any(s.label[1:])]
    if bare:
        raise ValueError(f"records without a single labelled token: {', '.join(bare)}; remove them from the data")
    samples = sorted(samples, key=lambda s: (len(s.ids), s.label.index(True, 1)))
    lengths = [len(s.ids) for s in samples]
    tails = [len(s.ids) - s.label.index(True, 1) + 1 for s in samples]  # a row predicts the token after it
    ids = torch.tensor([t for s in samples for t in s.ids])
    label = torch.tensor([x for s in samples for x in (False, *s.label[1:])])
    stream = Stream.of(lengths, tails)
    follows = torch.cat([label[1:], torch.tensor([False])])  # a segment's first token is never labelled
    return Batch(
        records=tuple(s.record for s in samples),
        stream=stream,
        ids=ids,
        pixels=torch.cat([s.pixels for s in samples]),
        image_rows=(ids == IMAGE).nonzero()[:, 0],
        labelled=follows[stream.read].nonzero()[:, 0],
        targets=ids[label],
    )
