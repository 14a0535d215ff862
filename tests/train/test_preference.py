"""Losses of preference against arithmetic: numbers here are made by `math`, never by the losses.

One pair throughout: the policy gives the chosen answer -3 and the rejected one -6, the reference
-4 and -5.5, so that the log-ratios are 1 and -0.5 and their difference 1.5; the answers have 4 and
2 tokens.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmray.arguments.rlhf import RlhfArguments
from llmray.batch import Batch
from llmray.errors import TrainingError
from llmray.model.head import TokenOutput
from llmray.train.preference import (
    PREFERENCE_LOSSES,
    Judged,
    Pairs,
    PairStatistics,
    Preference,
    RunningMean,
    bco_loss,
    beyond_the_shorter,
    effective_weights,
    kto_losses,
)


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


PAIR = Pairs(*one(-3, -6, 4, 2, -4, -5.5))
STEP = PairStatistics(chosen_kl=0.75, rejected_kl=0.25, shift=0.05)


def minus_log_sigmoid(value: float) -> float:
    return math.log1p(math.exp(-value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


EXPECTED: dict[str, tuple[dict[str, Any], float]] = {
    # -log sigmoid(0.1 * 1.5)
    "sigmoid": ({}, minus_log_sigmoid(0.15)),
    # 0.8 of it, and 0.2 of the pair turned round
    "smoothed": (
        {"pref_loss": "sigmoid", "dpo_label_smoothing": 0.2},
        0.8 * minus_log_sigmoid(0.15) + 0.2 * minus_log_sigmoid(-0.15),
    ),
    # 1 - 0.1 * 1.5
    "hinge": ({}, 0.85),
    # by token 1 / 4 and -0.5 / 2: their difference 0.5, minus 1 / (2 * 0.1) = 5, squared
    "ipo": ({}, 20.25),
    # (1 - sigmoid(0.1 * (1 - 0.25)) + 1 - sigmoid(0.1 * (0.75 + 0.5))) / 2
    "kto_pair": ({}, (2 - sigmoid(0.075) - sigmoid(0.125)) / 2),
    # by token -0.75 and -3: odds p / (1 - p) of e^-0.75 and e^-3
    "orpo": (
        {},
        0.75
        + 0.1
        * minus_log_sigmoid(
            math.log(math.exp(-0.75) / (1 - math.exp(-0.75)))
            - math.log(math.exp(-3) / (1 - math.exp(-3)))
        ),
    ),
    # 0.1 * (-0.75 + 3) - 0.5
    "simpo": ({}, minus_log_sigmoid(0.225 - 0.5)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_losses_by_worked_arithmetic(name: str) -> None:
    keys, expected = EXPECTED[name]
    options = RlhfArguments(**{"pref_loss": name, **keys})
    loss = PREFERENCE_LOSSES[options.pref_loss](PAIR, options, STEP)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text())


def made_up(name: str) -> torch.Tensor:
    return torch.tensor(TRL[name], dtype=torch.float64)


@pytest.mark.parametrize("name", TRL["pairs"])
def test_losses_equal_those_of_trl(name: str) -> None:
    """On six pairs; by `benchmarks/trl_losses.py`. Of kto_pair it has none any more."""
    keys, expected = TRL["pairs"][name]["keys"], TRL["pairs"][name]["losses"]
    options = RlhfArguments(**{"pref_loss": name, "pref_beta": TRL["beta"], **keys})
    policy, reference, lengths = made_up("policy"), made_up("reference"), made_up("lengths")
    pairs = Pairs(*policy, *lengths, *reference)
    losses = PREFERENCE_LOSSES[options.pref_loss](pairs, options, PairStatistics())
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)


def test_kto_equals_that_of_trl() -> None:
    """Of the answers of the pairs one is wanted; the divergence is that of six others."""
    found = TRL["kto"]
    options = RlhfArguments(pref_beta=TRL["beta"], **found["keys"])
    ratios = (made_up("policy") - made_up("reference")).flatten()
    policy, reference = torch.tensor(found["others"], dtype=torch.float64)
    kl = Judged(options).informed([(policy - reference).sum().item(), 6, 6], learns=True).kl
    assert kl == pytest.approx(found["kl"], rel=1e-9)
    wanted = torch.arange(12) < 6
    assert kto_losses(ratios, wanted, kl, options).tolist() == pytest.approx(
        found["losses"], rel=1e-9
    )


def test_all_losses_are_worked() -> None:
    assert set(PREFERENCE_LOSSES) == set(EXPECTED) - {"smoothed"}
    assert set(PREFERENCE_LOSSES) == {*TRL["pairs"], "kto_pair"} - {"smoothed"}


def test_binary_classifier_loss() -> None:
    """-log sigmoid(0.1 - 0.05) - log sigmoid(-(-0.05 - 0.05))"""
    expected = minus_log_sigmoid(0.05) + minus_log_sigmoid(0.1)
    assert bco_loss(PAIR, RlhfArguments(), STEP).item() == pytest.approx(expected, rel=1e-12)


def test_kto_by_worked_arithmetic() -> None:
    """Ratios 1 and -0.5, divergence 0.2, beta 0.5: weights 2 of the wanted, 3 of the unwanted."""
    options = RlhfArguments(pref_beta=0.5, kto_chosen_weight=2.0, kto_rejected_weight=3.0)
    ratios, wanted = torch.tensor([1.0, -0.5]).double(), torch.tensor([True, False])
    losses = kto_losses(ratios, wanted, 0.2, options)
    expected = [2 * (1 - sigmoid(0.5 * 0.8)), 3 * (1 - sigmoid(0.5 * 0.7))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("average", [-1e-9, 0.0, -1e-3, -0.7, -40.0])
def test_odds_near_certainty_stay_finite(average: float) -> None:
    chosen = torch.tensor([4 * average], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-6.0], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(chosen, rejected, *one(4, 2))
    loss = PREFERENCE_LOSSES["orpo"](pairs, RlhfArguments(), STEP)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert all(torch.isfinite(t).all() for t in (loss, chosen.grad, rejected.grad))


# --- what is read from a batch -------------------------------------------------------------------

LOGPROBS = [-1.0, -0.5, -1.0, -0.5, -4.0, -2.0]  # 4 tokens of the chosen, 2 of the rejected answer


def batch(**fields: Any) -> Batch:
    made = Batch(
        input_ids=torch.zeros(1, 8, dtype=torch.int64),
        position_ids=torch.arange(8)[None],
        targets=torch.arange(6),
        target_ids=torch.arange(6),
        target_sample=torch.tensor([0, 0, 0, 0, 1, 1]),
        num_samples=2,
        num_tokens=8,
        reference=torch.tensor([-4.0, -5.5], dtype=torch.float64),
        rows=(7,),
    )
    return replace(made, **fields)


def output(values: list[float] = LOGPROBS) -> TokenOutput:
    return TokenOutput(torch.tensor(values, requires_grad=True))


@pytest.mark.parametrize("name", EXPECTED)
def test_objectives_read_pairs_from_a_batch(name: str) -> None:
    keys, expected = EXPECTED[name]
    objective = Preference(RlhfArguments(**{"pref_loss": name, **keys}), STEP)
    assert objective.count(batch()) == 1
    assert objective(output(), batch()).loss.item() == pytest.approx(expected, rel=1e-6)


def test_metrics_by_hand() -> None:
    found = Preference(RlhfArguments(pref_beta=0.5))(output(), batch()).metrics
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": -0.25,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.75,
            "logps/chosen": -3.0,
            "logps/rejected": -6.0,
            "kl": 0.25,
            "chosen_falls": 0.0,
        }
    )
    found = Preference(RlhfArguments(pref_loss="simpo"))(output(), batch(reference=None)).metrics
    assert "kl" not in found
    assert found["rewards/chosen"].item() == pytest.approx(-0.075)  # 0.1 * -3 / 4
    assert found["logps/rejected"].item() == pytest.approx(-3.0)


def test_tokens_beyond_the_shorter_answer_weigh_ld_alpha() -> None:
    """Of the chosen answer two tokens count whole, -1.5, and two by half, -0.75: ratio 1.75."""
    assert beyond_the_shorter(batch()).tolist() == [False, False, True, True, False, False]
    objective = Preference(RlhfArguments(ld_alpha=0.5))
    expected = minus_log_sigmoid(0.1 * (1.75 + 0.5))
    assert objective(output(), batch()).loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_supervised_part_is_the_mean_of_the_chosen_answer() -> None:
    """3 nats over 4 tokens, half of it."""
    objective = Preference(RlhfArguments(pref_ftx=0.5))
    expected = minus_log_sigmoid(0.15) + 0.5 * 0.75
    assert objective(output(), batch()).loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_classifier_s_part_is_weighed_against_the_pair_s() -> None:
    objective = Preference(RlhfArguments(pref_bco_weight=3.0), STEP)
    bco = minus_log_sigmoid(0.05) + minus_log_sigmoid(0.1)
    expected = (minus_log_sigmoid(0.15) + 3 * bco) / 4
    assert objective(output(), batch()).loss.item() == pytest.approx(expected, rel=1e-6)


def test_statistics_of_pairs_are_clamped_means() -> None:
    """Sums 1 and -0.5 of one pair; with twice as many pairs of 3 and -1: means 5 / 3 and 0."""
    objective = Preference(RlhfArguments(pref_loss="kto_pair", pref_bco_weight=1.0))
    assert objective.needs_statistics
    sums = objective.statistics(batch(), lambda of: output().logprobs.detach())
    assert sums.tolist() == pytest.approx([1.0, -0.5, 1.0])
    informed = objective.informed([7.0, -1.5, 3.0], learns=True)
    assert informed.step.chosen_kl == pytest.approx(7 / 3)
    assert informed.step.rejected_kl == 0.0
    assert informed.step.shift == pytest.approx(0.1 * 5.5 / 6)
    again = objective.informed([7.0, -1.5, 3.0], learns=False)
    assert again.step.shift == informed.step.shift
    assert not Preference(RlhfArguments()).needs_statistics


def test_a_running_mean_goes_on_from_its_state() -> None:
    """(2 + 4 + 9) / 3, then 5 more twice: 25 / 5."""
    mean = RunningMean()
    mean.add(15.0, 3)
    other = RunningMean()
    other.load_state_dict(mean.state_dict())
    other.add(10.0, 2)
    assert (mean.mean, other.mean) == (5.0, 5.0)


def test_judged_answers_compare_with_the_divergence_of_the_step() -> None:
    other = batch(reference=torch.tensor([-4.5, -5.0], dtype=torch.float64))
    judged = batch(is_wanted=torch.tensor([True, False]), mismatched=other)
    objective = Judged(RlhfArguments(pref_beta=0.5, kto_rejected_weight=2.0))
    # of the mismatched: -3 + 4.5 and -6 + 5
    sums = objective.statistics(judged, lambda of: output().logprobs.detach())
    assert sums.tolist() == pytest.approx([0.5, 1.0, 2.0])
    informed = objective.informed([3.0, 1.0, 2.0], learns=True)
    assert (informed.kl, informed.share_wanted) == (1.5, 0.5)
    found = informed(output(), judged)
    expected = (1 - sigmoid(0.5 * (1 - 1.5))) + 2 * (1 - sigmoid(0.5 * (1.5 + 0.5)))
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
    assert objective.informed([-3.0, 1.0, 2.0], learns=True).kl == 0.0
    means = {name: value.item() / 2 for name, value in found.metrics.items()}
    assert informed.described(means) == pytest.approx(
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": -0.25,
            "rewards/margins": 0.75,
            "logps/chosen": -3.0,
            "logps/rejected": -6.0,
            "chosen_falls": 0.0,
            "kl": 1.5,
        }
    )


def test_answers_of_one_kind_alone_are_right() -> None:
    judged = batch(is_wanted=torch.tensor([False, False]))
    found = Judged(RlhfArguments(pref_beta=0.5))(output(), judged)
    expected = (1 - sigmoid(0.5 * -1.0)) + (1 - sigmoid(0.5 * 0.5))
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
    means = {name: value.item() / 2 for name, value in found.metrics.items()}
    described = Judged(RlhfArguments()).described(means)
    assert set(described) == {"rewards/rejected", "logps/rejected", "kl"}
    assert described["logps/rejected"] == pytest.approx(-4.5)


def test_the_supervised_part_of_kto_is_a_mean_over_wanted_answers() -> None:
    """One of 4 is wanted, so that of 0.75 by token the sum over answers is four times as large."""
    judged = batch(is_wanted=torch.tensor([True, False]))
    plain = Judged(RlhfArguments())(output(), judged).loss.item()
    with_it = Judged(RlhfArguments(pref_ftx=0.5), share_wanted=0.25)(output(), judged).loss.item()
    assert with_it - plain == pytest.approx(0.5 * 0.75 * 4, rel=1e-6)


@pytest.mark.parametrize("objective", [Preference(RlhfArguments()), Judged(RlhfArguments())])
def test_no_answers_are_no_loss(objective: Any) -> None:
    nothing = batch(
        targets=torch.zeros(0, dtype=torch.int64),
        target_ids=torch.zeros(0, dtype=torch.int64),
        target_sample=torch.zeros(0, dtype=torch.int64),
        num_samples=0,
        reference=torch.zeros(0, dtype=torch.float64),
    )
    found = objective(output([]), nothing)
    found.loss.backward()
    assert found.loss.item() == 0.0
    some = objective(output(), batch(is_wanted=torch.tensor([True, False])))
    assert found.metrics.keys() == some.metrics.keys()


def test_a_row_whose_answer_is_no_number_is_named() -> None:
    values = [*LOGPROBS[:5], math.nan]
    with pytest.raises(TrainingError, match="row 7 of the table"):
        Preference(RlhfArguments())(output(values), batch())


@pytest.mark.parametrize(
    ("wanted", "rows", "keys", "expected"),
    [
        (30, 60, {}, 1.0),
        (10, 60, {"kto_chosen_weight": 6.0}, 1.2),
        (60, 60, {}, math.inf),
        (10, 60, {"kto_rejected_weight": 0.1}, 2.0),
    ],
)
def test_weights_of_all_answers(wanted: int, rows: int, keys: Any, expected: float) -> None:
    assert effective_weights(wanted, rows, RlhfArguments(**keys)) == pytest.approx(expected)
