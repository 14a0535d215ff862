"""Samples to one micro-batch: a flat row, or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

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


def _with_targets(samples: Sequence[Sample], flat: bool, pad_id: int, num_samples: int) -> Batch:
    lengths = [len(sample.input_ids) for sample in samples]
    width = max(lengths)
    # where in the flattened input each sample begins
    starts = np.cumsum([0, *lengths[:-1]]) if flat else np.arange(len(samples)) * width
    places = [np.flatnonzero(sample.target_mask) for sample in samples]
    positions = [start + place - 1 for start, place in zip(starts, places, strict=True)]
    ids = [sample.target_ids() for sample in samples]
    owners = np.repeat(np.arange(len(samples)), [len(place) for place in places])
    layout = _flat(samples, lengths) if flat else _padded(samples, lengths, pad_id)
    return Batch(
        input_ids=layout[0],
        position_ids=layout[1],
        targets=_int64(np.concatenate(positions)),
        target_ids=_int64(np.concatenate(ids)),
        target_sample=_int64(owners),
        num_samples=num_samples,
        num_tokens=sum(lengths) if num_samples else 0,
        segments=Segments(tuple(lengths), tuple(lengths)) if flat else None,
        attention_mask=layout[2],
    )


def _flat(
    samples: Sequence[Sample], lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, None]:
    ids = np.concatenate([sample.input_ids for sample in samples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    return _int64(ids)[None], _int64(positions)[None], None


def _padded(
    samples: Sequence[Sample], lengths: Sequence[int], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = np.full((len(samples), width), pad_id, np.int64)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.input_ids)] = sample.input_ids
    positions = np.broadcast_to(np.arange(width), ids.shape)
    mask = np.arange(width) < np.array(lengths)[:, None]
    return _int64(ids), _int64(positions), _int64(mask)


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
