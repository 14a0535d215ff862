"""The same random sequences as a flat row, as a padded rectangle, and one at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmray.batch import Batch, Segments

LENGTHS = (7, 1, 12, 3)


@dataclass(frozen=True)
class Rows:
    """Sequences whose every token but the first is a target, in all three layouts."""

    flat: Batch
    padded: Batch
    sequences: tuple[Tensor, ...]  # each (1, T)

    def batch(self, *, flat: bool) -> Batch:
        return self.flat if flat else self.padded


def make_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    sequences = tuple(torch.randint(3, 300, (1, n), generator=generator) for n in lengths)
    return Rows(_flat(sequences), _padded(sequences), sequences)


def lone_logits(model: PreTrainedModel, sequences: tuple[Tensor, ...]) -> Tensor:
    """(n, V) logits at all targets, each sequence run alone in the model's own way."""
    parts = [model(s, use_cache=False).logits[0, :-1] for s in sequences]
    return torch.cat(parts).float()


def target_logprobs(logits: Tensor, target_ids: Tensor) -> Tensor:
    """(n,) log-probabilities through torch's double precision."""
    return logits.double().log_softmax(-1).gather(1, target_ids[:, None]).squeeze(1)


def _flat(sequences: tuple[Tensor, ...]) -> Batch:
    lengths = tuple(s.shape[1] for s in sequences)
    ids = torch.cat(sequences, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])
    targets = torch.tensor([i for i in range(len(positions) - 1) if positions[i + 1] > 0])
    return Batch(
        input_ids=ids,
        position_ids=positions[None],
        targets=targets,
        target_ids=ids[0, targets + 1],
        target_sample=_samples(lengths),
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        segments=Segments(lengths, lengths),
    )


def _padded(sequences: tuple[Tensor, ...]) -> Batch:
    lengths = tuple(s.shape[1] for s in sequences)
    shape = len(lengths), max(lengths)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : lengths[i]] = sequence[0]
        mask[i, : lengths[i]] = 1
    rows = [torch.arange(n - 1) + i * shape[1] for i, n in enumerate(lengths)]
    targets = torch.cat(rows)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(shape[1]).repeat(shape[0], 1),
        targets=targets,
        target_ids=ids.flatten()[targets + 1],
        target_sample=_samples(lengths),
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        attention_mask=mask,
    )


def _samples(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([i for i, n in enumerate(lengths) for _ in range(n - 1)])
