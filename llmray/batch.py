"""What goes through a model in one micro-batch: a flat row or a padded rectangle, and its targets.

The one type that data builds, the model reads and the losses see; a loss looks at the three target
fields alone and so never learns the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The sequences of a flat row, one after the other.

    `lengths_q` and `lengths_k` are Python tuples, so that splitting by them needs no host sync.
    They differ only where answers share a prompt: then `key_index` says which positions of the row
    are the keys of all segments, one after the other.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    key_index: Tensor | None = None  # (sum(lengths_k),) int64, positions of the row


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a flat row `(1, N)` with `segments`, or padded `(B, T)` with a mask.

    The n targets are (position, token) pairs: `targets[i]` is the position, in the row-major
    flattened input, whose hidden state predicts token `target_ids[i]`; `target_sample[i]` is the
    sample it counts for. A batch without targets is legal: a rank that has run out of rows takes
    part with one token and no target.

    Of pairs, samples 2i and 2i + 1 are the chosen and the rejected answer of pair i. Judged answers
    have `is_wanted`, and `mismatched`: the same prompts with the answers of other rows. `reference`
    holds the reference's log-probability of each sample's targets together, where it is known
    beforehand; `rows` are the numbers of the rows in their table.
    """

    input_ids: Tensor  # (1, N) or (B, T), int64
    position_ids: Tensor  # as input_ids, int64; restarts at 0 with each sequence
    targets: Tensor  # (n,) int64
    target_ids: Tensor  # (n,) int64
    target_sample: Tensor  # (n,) int64, in 0 .. num_samples - 1
    num_samples: int
    num_tokens: int  # real tokens, padding not counted
    segments: Segments | None = None
    attention_mask: Tensor | None = None  # (B, T) int64, 1 where a token is
    ends: Tensor | None = None  # (num_samples,) int64, position of each sample's last token
    # what is known of each target beside its id, by name, each (n,): old log-probabilities, ...
    given: Mapping[str, Tensor] = field(default_factory=dict)
    is_wanted: Tensor | None = None  # (num_samples,) bool
    mismatched: Batch | None = None
    reference: Tensor | None = None  # (num_samples,) float64
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`; tensors that are there already are not copied."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """This batch with every tensor replaced by what `function` makes of it."""
        changed: dict[str, Tensor | Batch] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = function(value)
            elif isinstance(value, Batch):
                changed[item.name] = value.map(function)
        given = {name: function(tensor) for name, tensor in self.given.items()}
        segments = self.segments
        if segments is not None and segments.key_index is not None:
            segments = replace(segments, key_index=function(segments.key_index))
        return replace(self, segments=segments, given=given, **changed)  # type: ignore[arg-type]
