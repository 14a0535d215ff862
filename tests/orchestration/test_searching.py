"""optuna behind a sweep: what it is asked, what it is told, and how it goes on."""

import pytest

from llmray.arguments.space import parse
from llmray.arguments.tune import Scheduler, Sweep
from llmray.orchestration.ledger import Entry
from llmray.orchestration.searching import Asked
from llmray.orchestration.verdicts import Report

optuna = pytest.importorskip("optuna")

SEARCH = {
    "learning_rate": {"loguniform": [1e-5, 1e-2]},
    "lora_dropout": {"uniform": [0, 0.5]},
    "lora_rank": {"choice": [4, 8, 16]},
    "warmup_steps": {"randint": [0, 5]},
    "weight_decay": {"quniform": [0, 0.3, 0.1]},
    "loraplus_lr_ratio": {"choice": [4, 16], "when": {"lora_rank": 16}},
}
VARIANTS = ({"stage": "sft"}, {"stage": "pt"})


def sweep(num_samples=20, seed=3):
    space, problems = parse(SEARCH, VARIANTS)
    assert problems == []
    settings = (num_samples, "eval_loss", "min", Scheduler("none", {}), None, None, seed)
    return Sweep(space, "optuna", *settings)


def asked(searcher):
    found = []
    while (values := searcher.next()) is not None:
        found.append(values)
    return found


def entry(number, values, state="done", metric=1.0, reports=()):
    return Entry(
        number,
        f"trial_{number:03d}",
        values,
        "nowhere",
        state,
        metric=metric,
        reports=list(reports),
    )


def test_proposals_lie_in_the_space():
    found = asked(Asked(sweep()))
    assert len(found) == 20
    for values in found:
        assert 1e-5 <= values["learning_rate"] <= 1e-2
        assert 0 <= values["lora_dropout"] <= 0.5
        assert values["lora_rank"] in (4, 8, 16)
        assert values["warmup_steps"] in range(6)
        assert values["weight_decay"] in (0, 0.1, 0.2, 0.3)
        assert ("loraplus_lr_ratio" in values) == (values["lora_rank"] == 16)
        assert values["stage"] in ("sft", "pt")
    assert {values["stage"] for values in found} == {"sft", "pt"}


def test_the_same_seed_proposes_the_same():
    assert asked(Asked(sweep(5))) == asked(Asked(sweep(5)))
    assert asked(Asked(sweep(5))) != asked(Asked(sweep(5, seed=4)))


def test_what_was_good_is_proposed_more_often():
    """Of 40 trials whose metric is the dropout, the last ten lie lower than the first ten."""
    searcher, drawn = Asked(sweep(40)), []
    for number in range(1, 41):
        values = searcher.next()
        drawn.append(values["lora_dropout"])
        searcher.tell(entry(number, values, metric=values["lora_dropout"]))
    assert sum(drawn[-10:]) < 0.6 * sum(drawn[:10])


def test_a_restart_knows_what_was_tried():
    first = Asked(sweep(6))
    before = [first.next() for _ in range(4)]
    entries = [
        entry(1, before[0], metric=0.5),
        entry(2, before[1], "stopped", 0.75, [Report(2, 0, 0, 0.75)]),
        entry(3, before[2], "failed", None),
        entry(4, before[3], "pending", None),
    ]
    again = Asked(sweep(6), entries)
    trials = again._study.get_trials()
    states = [trial.state.name for trial in trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.params["lora_dropout"] for trial in trials] == pytest.approx(
        [values["lora_dropout"] for values in before]
    )
    assert trials[0].value == 0.5
    again.tell(entry(4, before[3], metric=0.25))
    assert len(asked(again)) == 2
    assert again._study.best_value == 0.25
