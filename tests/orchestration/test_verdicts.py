"""Ray Tune's schedulers as a sweep hears them, on curves that are worked by hand."""

import math

import pytest

from llmray.orchestration.verdicts import Report, Verdicts


def verdicts(kind, mode="min", **settings):
    defaults = {
        "none": {},
        "asha": {"max_t": 8, "grace_period": 1},
        "hyperband": {"max_t": 8},
        "median": {"grace_period": 1},
    }
    timed = {} if kind == "none" else {"time_attr": "current_steps"}
    chosen = {**timed, **defaults[kind], **settings}
    return Verdicts(kind, chosen, metric="eval_loss", mode=mode, seed=1)


def report(step, value):
    return Report(step, step / 10, float(step), value)


def added(found, *names):
    for name in names:
        found.add(name)
        found.started(name)
    return found


def test_without_a_scheduler_nothing_stops():
    found = added(verdicts("none"), "a", "b")
    assert found.judge("a", report(1, 9.0)) == "go on"
    assert found.judge("b", report(8, 99.0)) == "go on"


@pytest.mark.parametrize(("mode", "worse"), [("min", 5.0), ("max", -5.0)])
def test_asha_stops_the_worse_one_at_the_first_rung(mode, worse):
    """Of four at step 1, those below the upper quartile of the ones before stop."""
    found = added(verdicts("asha", mode=mode), "a", "b", "c")
    better = 1.0 if mode == "min" else 9.0
    assert found.judge("a", report(1, better)) == "go on"
    assert found.judge("b", report(1, worse)) == "stop"
    assert found.judge("c", report(1, better)) == "go on"


def test_asha_begins_where_its_grace_ends():
    found = added(verdicts("asha", grace_period=4), "a", "b")
    assert found.judge("a", report(2, 1.0)) == "go on"
    assert found.judge("b", report(2, 5.0)) == "go on"
    assert found.judge("a", report(4, 1.0)) == "go on"
    assert found.judge("b", report(4, 5.0)) == "stop"


def test_asha_may_count_seconds():
    found = added(verdicts("asha", time_attr="time_total_s", grace_period=100, max_t=900), "a", "b")
    assert found.judge("a", report(2, 1.0)) == "go on"
    assert found.judge("b", Report(2, 0.1, 99.0, 5.0)) == "go on"
    assert found.judge("a", Report(3, 0.1, 101.0, 1.0)) == "go on"
    assert found.judge("b", Report(3, 0.1, 101.0, 5.0)) == "stop"


def test_median_compares_with_the_means_of_three_others():
    found = added(verdicts("median"), *"abcd")
    for name, value in zip("abc", (1.0, 2.0, 3.0), strict=True):
        assert found.judge(name, report(1, value)) == "go on"
    assert found.judge("d", report(1, 2.5)) == "stop"


def test_median_puts_nobody_aside_while_others_wait():
    found = verdicts("median")
    for name in "abcd":
        found.add(name)
    found.started("a")
    assert found.judge("a", report(1, 9.0)) == "go on"


def test_hyperband_pauses_at_a_border_and_lets_the_best_go_on():
    """Eight steps by thirds: three brackets; the second has ceil(3 / 2 * 3) = 5 trials of 2 steps,

    of which the better ceil(5 / 3) = 2 go on to step 6.
    """
    found = verdicts("hyperband")
    names = [f"t{number}" for number in range(8)]  # three for the first bracket, five for the next
    for name in names:
        found.add(name)
    second = names[3:]
    said = {}
    for value, name in enumerate(second):
        found.started(name)
        said[name] = found.judge(name, report(2, float(value)))
    assert [said[name] for name in second[:-1]] == ["pause"] * 4
    assert said[second[-1]] == "stop"
    assert set(found.put_out()) == set(second[2:4])
    assert found.put_out() == []
    for name in names[:3]:
        found.started(name)
    assert found.next(second[:2]) in second[:2]
    assert found.is_alive(second[0])
    assert not found.is_alive(second[3])


def test_hyperband_trains_what_it_kept_to_the_end_though_its_last_border_is_before():
    """2 * 3 = 6 is the last border of eight steps by thirds."""
    found = verdicts("hyperband", stop_last_trials=False)
    names = [f"t{number}" for number in range(8)]
    for name in names:
        found.add(name)
    for value, name in enumerate(names[3:]):
        found.started(name)
        found.judge(name, report(2, float(value)))
    for name in names[3:5]:
        found.started(name)
        assert [found.judge(name, report(step, 1.0)) for step in (4, 6, 7)] == ["go on"] * 3
        found.ended(name)
    assert set(found.put_out()) == set(names[5:7])


def test_hyperband_closes_a_bracket_when_its_last_trial_is_lost():
    found = verdicts("hyperband")
    names = [f"t{number}" for number in range(8)]
    for name in names:
        found.add(name)
    for value, name in enumerate(names[3:7]):
        found.started(name)
        assert found.judge(name, report(2, float(value))) == "pause"
    found.started(names[7])
    found.ended(names[7], failed=True)
    assert len(found.put_out()) == 2


def test_what_is_no_number_is_not_judged():
    found = added(verdicts("asha"), "a", "b")
    assert found.judge("a", report(1, 1.0)) == "go on"
    assert found.judge("b", report(1, math.nan)) == "go on"


def test_an_end_is_told_once():
    found = added(verdicts("asha"), "a")
    found.judge("a", report(1, 1.0))
    found.ended("a")
    found.ended("a", failed=True)
    assert not found.is_alive("a")
