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


def sweep(num_samples=20, seed=3, search=SEARCH, variants=VARIANTS):
    space, problems = parse(search, variants)
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


RANKS = {"lora_rank": {"choice": [4, 8, 16, 32]}}


@pytest.mark.parametrize("seed", range(4))
def test_no_two_trials_are_alike(seed):
    found = asked(Asked(sweep(4, seed, RANKS, ())))
    assert sorted(values["lora_rank"] for values in found) == [4, 8, 16, 32]


def test_a_sampler_that_has_learned_proposes_nothing_twice():
    """16 of 16 points, the metric of each told before the next is asked for."""
    search = {**RANKS, "weight_decay": {"quniform": [0, 0.3, 0.1]}}
    searcher, found = Asked(sweep(16, search=search, variants=())), []
    for number in range(1, 17):
        found.append(searcher.next())
        searcher.tell(entry(number, found[-1], metric=float(found[-1]["lora_rank"])))
    assert all(values not in found[:number] for number, values in enumerate(found))


def test_a_restart_goes_on_with_other_values():
    first = Asked(sweep(4))
    before = asked(first)
    entries = [entry(number, values) for number, values in enumerate(before, 1)]
    more = asked(Asked(sweep(8), entries))
    assert len(more) == 4
    rates = [values["learning_rate"] for values in [*before, *more]]
    assert len(set(rates)) == 8
    ranks = asked(Asked(sweep(2, search=RANKS, variants=())))
    entries = [entry(number, values) for number, values in enumerate(ranks, 1)]
    rest = asked(Asked(sweep(4, search=RANKS, variants=()), entries))
    assert sorted(values["lora_rank"] for values in [*ranks, *rest]) == [4, 8, 16, 32]


def test_the_largest_seed_has_a_restart_too():
    values = asked(Asked(sweep(1, 2**32 - 1)))
    assert len(asked(Asked(sweep(2, 2**32 - 1), [entry(1, values[0])]))) == 1


def test_whole_numbers_stay_whole_however_many_there_are():
    search = {"seed": {"randint": [1, 200_000]}, "warmup_ratio": {"quniform": [0, 0.5, 1e-6]}}
    found = asked(Asked(sweep(12, search=search, variants=())))
    for values in found:
        assert isinstance(values["seed"], int)
        assert 1 <= values["seed"] <= 200_000
        assert values["warmup_ratio"] == round(values["warmup_ratio"], 6)
    entries = [entry(number, values) for number, values in enumerate(found, 1)]
    again = Asked(sweep(12, search=search, variants=()), entries)
    numbers = [trial.params["seed"] + 1 for trial in again._study.get_trials()]
    assert numbers == [values["seed"] for values in found]


def test_what_no_trial_can_be_is_asked_for_again():
    def is_possible(values):
        return values["warmup_steps"] == 3

    searcher, found = Asked(sweep(12), is_possible=is_possible), []
    for number in range(1, 13):
        found.append(searcher.next())
        searcher.tell(entry(number, found[-1], metric=float(number)))
    assert {values["warmup_steps"] for values in found} == {3}
    states = [trial.state.name for trial in searcher._study.get_trials()]
    assert states.count("COMPLETE") == 12
    assert "FAIL" in states


def test_asking_ends_where_nothing_more_can_be(caplog):
    searcher = Asked(
        sweep(4, search=RANKS, variants=()), is_possible=lambda values: values["lora_rank"] < 16
    )
    assert sorted(values["lora_rank"] for values in asked(searcher)) == [4, 8]
    assert searcher.next() is None
    assert caplog.text.count("there are 2 of num_samples=4") == 1
