"""Bytes that a worker needs, from a model's configuration alone; no torch, no weights."""

from __future__ import annotations

from typing import Protocol


class DecoderConfig(Protocol):
    """The three sizes of a decoder that its activations grow with."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int


def activation_bytes(config: DecoderConfig, num_tokens: int, bytes_per_value: int) -> int:
    """Activations that backward needs without gradient checkpointing, in bytes, roughly.

    A layer of a gated decoder keeps about 16 values of hidden size (norms and their inputs, q, k,
    v before and after rotation, attention, residuals, adapters) and 6 of the intermediate size for
    each token; attention keeps no scores.
    """
    values = 16 * config.hidden_size + 6 * config.intermediate_size
    return num_tokens * config.num_hidden_layers * values * bytes_per_value
