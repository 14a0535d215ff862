"""Samples to one micro-batch: a flat row, or padded on the right.

Of a row with several answers the prompt stands once in a flat row, and before each in a rectangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmray.batch import Batch, Segments
from llmray.data.shards import Sample


def collate(samples: Sequence[Sample], *, flat: bool, pad_id: int) -> Batch:
    """The micro-batch of some samples; no samples give one token and no target.

    Args:
        samples: rows of a table.
        flat: one row (1, N) with segments; else (B, T) with a mask.
        pad_id: fills the rectangle; never a target, whatever it is.
    """
    if not samples:
        nothing = Sample(np.array([pad_id], np.int32), np.zeros(1, np.bool_))
        return _with_targets([nothing], flat, pad_id, num_samples=0)
    return _with_targets(samples, flat, pad_id, num_samples=len(samples))


def split(lengths: Sequence[int], max_cells: int) -> list[list[int]]:
    """Indices of samples in groups that, padded, have at most `max_cells` cells each.

    Samples of like length go together, the longest first; one is never split.
    """
    groups: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or width * (len(groups[-1]) + 1) > max_cells:
            groups.append([])
            width = lengths[index]
        groups[-1].append(index)
    return groups


def apart(sample: Sample) -> list[Sample]:
    """The answers of a row, each with the prompt as a row of its own; a row of one as it is."""
    if sample.starts is None or len(sample.starts) < 2:
        return [sample]
    ends = [*sample.starts[1:].tolist(), len(sample.input_ids)]
    first = int(sample.starts[0])
    parts = [
        np.concatenate([np.arange(first), np.arange(start, end)])
        for start, end in zip(sample.starts.tolist(), ends, strict=True)
    ]
    return [Sample(sample.input_ids[part], sample.target_mask[part]) for part in parts]


def _with_targets(samples: Sequence[Sample], flat: bool, pad_id: int, num_samples: int) -> Batch:
    """The batch of samples; `num_samples` is 0 for the one token that stands for none."""
    layout = _flat(samples) if flat else _padded([s for one in samples for s in apart(one)], pad_id)
    ids = [part for sample in samples for part in _targets_by_answer(sample)]
    wanted = [sample.is_wanted for sample in samples if sample.is_wanted is not None]
    others = [sample.mismatched for sample in samples if sample.mismatched is not None]
    return Batch(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        targets=layout.targets,
        target_ids=_int64(np.concatenate(ids)),
        target_sample=_int64(np.repeat(np.arange(len(ids)), [len(part) for part in ids])),
        num_samples=len(ids) if num_samples else 0,
        num_tokens=layout.num_tokens if num_samples else 0,
        segments=layout.segments,
        attention_mask=layout.attention_mask,
        ends=layout.ends[: len(ids) if num_samples else 0],
        is_wanted=torch.tensor(wanted) if wanted else None,
        mismatched=collate(others, flat=flat, pad_id=pad_id) if others else None,
    )


def _targets_by_answer(sample: Sample) -> list[np.ndarray]:
    """The tokens that are learned, of each answer."""
    if sample.starts is None or len(sample.starts) < 2:
        return [sample.target_ids()]
    before = np.cumsum(sample.target_mask)[sample.starts[1:] - 1]  # targets before each answer
    return np.split(sample.target_ids(), before)


@dataclass(frozen=True)
class _Layout:
    """Tokens in a row or a rectangle, and the positions that predict the targets."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    ends: torch.Tensor  # of the answers, or of rows without several
    num_tokens: int
    segments: Segments | None = None
    attention_mask: torch.Tensor | None = None


def _flat(samples: Sequence[Sample]) -> _Layout:
    """All samples in one row; answers that share a prompt attend to it where it stands."""
    rows = [_FlatRow.of(sample) for sample in samples]
    starts = np.cumsum([0, *(len(sample.input_ids) for sample in samples)])
    lengths_q = tuple(length for row in rows for length in row.lengths_q)
    lengths_k = tuple(length for row in rows for length in row.lengths_k)
    key_index = None
    if lengths_q != lengths_k:
        keys = [row.keys + start for row, start in zip(rows, starts, strict=False)]
        key_index = _int64(np.concatenate(keys))
    places = [
        row.predictors[sample.target_mask] + start
        for row, sample, start in zip(rows, samples, starts, strict=False)
    ]
    return _Layout(
        _int64(np.concatenate([sample.input_ids for sample in samples]))[None],
        _int64(np.concatenate([row.positions for row in rows]))[None],
        _int64(np.concatenate(places)),
        _int64(np.cumsum(lengths_q) - 1),
        int(starts[-1]),
        Segments(lengths_q, lengths_k, key_index),
    )


@dataclass(frozen=True)
class _FlatRow:
    """A sample in a flat row: for each token its position and the place that predicts it.

    `keys` are the places that the segments look at, one after the other.
    """

    positions: np.ndarray  # (T,)
    predictors: np.ndarray  # (T,)
    keys: np.ndarray  # (sum(lengths_k),)
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    @classmethod
    def of(cls, sample: Sample) -> _FlatRow:
        """The layout of a row of one sequence, or of answers behind their prompt."""
        places = np.arange(len(sample.input_ids))
        if sample.starts is None or len(sample.starts) < 2:
            return cls(places, places - 1, places, (len(places),), (len(places),))
        first, *others = sample.starts.tolist()
        ends = [*others, len(places)]
        positions, predictors = places.copy(), places - 1
        keys, lengths_q, lengths_k = [places[: ends[0]]], [ends[0]], [ends[0]]
        for start, end in zip(others, ends[1:], strict=True):
            positions[start:end] += first - start
            predictors[start : start + 1] = first - 1
            keys += [places[:first], places[start:end]]
            lengths_q.append(end - start)
            lengths_k.append(first + end - start)
        return cls(positions, predictors, np.concatenate(keys), tuple(lengths_q), tuple(lengths_k))


def _padded(samples: Sequence[Sample], pad_id: int) -> _Layout:
    lengths = [len(sample.input_ids) for sample in samples]
    width = max(lengths)
    ids = np.full((len(samples), width), pad_id, np.int64)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.input_ids)] = sample.input_ids
    positions = np.broadcast_to(np.arange(width), ids.shape)
    mask = np.arange(width) < np.array(lengths)[:, None]
    starts = np.arange(len(samples)) * width
    places = [
        np.flatnonzero(sample.target_mask) - 1 + start
        for sample, start in zip(samples, starts, strict=True)
    ]
    return _Layout(
        _int64(ids),
        _int64(positions),
        _int64(np.concatenate(places)),
        _int64(starts + np.array(lengths) - 1),
        sum(lengths),
        attention_mask=_int64(mask),
    )


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
