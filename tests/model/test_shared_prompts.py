"""Pairs whose prompt is computed once, against their sequences alone: values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import build_model

from llmray.batch import Batch
from llmray.data.collate import apart, collate
from llmray.data.shards import Sample
from llmray.model.attention import why_not_flat
from llmray.model.head import TokenModel

# windows of 5 tokens reach over the border of prompt and answer
FLAT = ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "qwen3_moe"]
PADDED = ["falcon_h1", "lfm2"]


def pairs() -> list[Sample]:
    draw = np.random.default_rng(0)
    made = []
    for prompt, chosen, rejected in ((9, 6, 4), (3, 2, 8), (12, 1, 1)):
        ids = draw.integers(3, 300, prompt + chosen + rejected).astype(np.int32)
        mask = np.arange(len(ids)) >= prompt
        starts = np.array([prompt, prompt + chosen], np.int32)
        made.append(Sample(ids, mask, starts=starts))
    return made


def logprobs_and_gradients(model: Any, batches: list[Batch]) -> tuple[torch.Tensor, list[Any]]:
    """Log-probabilities at all targets, and the gradient of a sum with weights of its own."""
    model.zero_grad()
    found = torch.cat([model(batch).logprobs for batch in batches])
    weights = torch.linspace(-1, 1, len(found))
    (found * weights).sum().backward()
    return found.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def sums(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(batch.num_samples).index_add(0, batch.target_sample, logprobs)


@pytest.mark.parametrize("arch", [*FLAT, *PADDED])
def test_a_shared_prompt_equals_sequences_alone(arch: str) -> None:
    base = build_model(arch, amplify=3.0)
    flat = why_not_flat(base) is None
    assert flat == (arch in FLAT)
    model = TokenModel(base, flat=flat)
    together = collate(pairs(), flat=flat, pad_id=0)
    assert together.num_samples == 6
    alone = [collate([one], flat=flat, pad_id=0) for pair in pairs() for one in apart(pair)]
    values, gradients = logprobs_and_gradients(model, [together])
    expected, expected_gradients = logprobs_and_gradients(model, alone)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    by_sample = [batch.target_ids.numel() for batch in alone]
    whole = torch.stack([part.sum() for part in expected.split(by_sample)])
    torch.testing.assert_close(sums(together, values), whole, atol=0, rtol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
