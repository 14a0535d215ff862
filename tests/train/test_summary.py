"""Figures of a run: FLOPs against torch's own counter, peaks by name, words."""

from __future__ import annotations

import pytest
import torch
from tiny import build_model
from torch.utils.flop_counter import FlopCounterMode

from llmray.train.reading import Work
from llmray.train.summary import PEAKS, Cost, Phases, Summary, cost_of, peak_flops


def counted(model: torch.nn.Module, length: int) -> float:
    """FLOPs of forward and backward over one row, as torch counts those of its products."""
    ids = torch.randint(3, 300, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", ["all", "mlp"])
def test_flops_are_those_that_torch_counts(trains: str) -> None:
    """In plain attention torch computes all pairs, we count those before each token: half of them.

    The first layer needs no gradient of its input, which the formula counts: within 4 %.
    """
    model = build_model("llama", attn_implementation="eager", num_hidden_layers=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "all" or trains in name)
    length = 64
    cost = cost_of(model)
    all_pairs = Cost(cost.per_token, cost.per_target, 2 * cost.per_pair, cost.backward)
    ours = all_pairs.of(Work(length, length, length**2))
    assert ours == pytest.approx(counted(model, length), rel=0.15 if trains == "mlp" else 0.04)


def test_what_does_not_train_costs_no_gradient_of_its_own() -> None:
    full, frozen = build_model("llama"), build_model("llama").requires_grad_(False)
    assert cost_of(full).backward == pytest.approx(2.0)
    assert cost_of(frozen).backward == 1.0


def test_experts_count_for_the_tokens_that_they_get() -> None:
    """Of 4 experts 2 are chosen: half of their weights take part in a token."""
    model = build_model("mixtral")
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    rest = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() > 1 and "experts" not in n and "embed" not in n and "lm_head" not in n
    )
    assert cost_of(model).per_token == 2 * (experts / 2 + rest)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H200", "pure_bf16", 989.5e12),
        ("Tesla T4", "fp16", 65e12),
        ("NVIDIA A10G", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, expected: float | None) -> None:
    assert peak_flops(name, precision) == expected


def test_longer_names_stand_before_those_that_they_hold() -> None:
    names = list(PEAKS)
    for i, name in enumerate(names):
        assert not any(set(earlier.split()) <= set(name.split()) for earlier in names[:i])


def summary(peak: float | None) -> Summary:
    phases = Phases(start=1.0, data=1.0, training=3.0, evaluation=0.5, saving=0.25)
    return Summary(1200, 10, 2, phases, 8e12, peak, "H100", 3_000_000_000)


def test_utilisation_by_hand() -> None:
    """8e12 FLOPs in 4 s on 2 devices of 10e12 a second: a tenth."""
    found = summary(10e12)
    assert found.utilisation == pytest.approx(0.1)
    assert found.metrics() == {
        "seconds_start": 1.0,
        "seconds_data": 1.0,
        "seconds_training": 3.0,
        "seconds_evaluation": 0.5,
        "seconds_saving": 0.25,
        "total_flos": 8e12,
        "mfu": 0.1,
        "peak_memory_gb": 3.0,
    }
    assert "1,200 tokens in 10 steps" in found.lines()[0]
    assert "1 TFLOP/s a worker (MFU 10.0% of 10 of H100)" in found.lines()[1]


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    found = summary(None)
    assert "mfu" not in found.metrics()
    assert "peak is not known" in found.lines()[1]
