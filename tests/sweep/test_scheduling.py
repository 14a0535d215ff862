"""Where a scheduler compares trials of a run, and how many steps it leaves."""

import pytest
from ray.tune.schedulers import HyperBandScheduler
from sweeps import sweep

from llmray.orchestration.verdicts import Report, Verdicts
from llmray.sweep.scheduling import Length, expected_steps, length_by_rows, rungs, settings

LENGTH = Length(total_steps=80, steps_per_epoch=40, eval_steps=5)
RATES = {"learning_rate": {"loguniform": [1e-5, 1e-3]}}


def scheduler(given):
    return sweep({"search": RATES, "scheduler": given})[1].scheduler


def test_halving_begins_at_the_first_evaluation_and_ends_with_the_run():
    found = settings(scheduler("asha"), LENGTH)
    assert (found["grace_period"], found["max_t"], found["reduction_factor"]) == (5, 80, 4)
    assert rungs(found) == [5, 20]


def test_what_is_given_stays():
    found = settings(scheduler({"asha": {"grace_period": 10, "max_t": 40}}), LENGTH)
    assert (found["grace_period"], found["max_t"]) == (10, 40)


def test_epochs_are_counted_as_such():
    found = settings(scheduler({"asha": {"time_attr": "epoch"}}), LENGTH)
    assert (found["grace_period"], found["max_t"]) == (0.125, 2)


def test_seconds_begin_at_one_and_have_no_end():
    found = settings(scheduler({"asha": {"time_attr": "time_total_s"}}), LENGTH)
    assert (found["grace_period"], found["max_t"]) == (1, 10**9)


def test_other_schedulers_get_what_they_take():
    assert settings(scheduler("none"), LENGTH) == {}
    assert settings(scheduler("median"), LENGTH)["grace_period"] == 5
    assert settings(scheduler("hyperband"), LENGTH)["max_t"] == 80
    assert settings(scheduler("hyperband"), LENGTH)["stop_last_trials"] is False
    given = scheduler({"hyperband": {"max_t": 40}})
    assert settings(given, LENGTH)["stop_last_trials"] is True
    assert "grace_period" not in settings(scheduler("hyperband"), LENGTH)


@pytest.mark.parametrize("max_t", [1, 3, 5, 20, 50])
def test_an_end_before_the_first_evaluation_is_taken_by_the_scheduler(max_t):
    found = settings(scheduler({"asha": {"max_t": max_t}}), Length(40, 40, 10))
    judge = Verdicts("asha", found, metric="eval_loss", mode="min", seed=0)
    judge.add("a")
    said = judge.judge("a", Report(10, 0.25, 1.0, 2.0))
    assert said == ("stop" if max_t <= 10 else "go on")


def test_hyperband_that_compares_nothing_is_said_as_soon_as_the_length_is_known(caplog):
    given = {"hyperband": {"time_attr": "epoch"}}
    one = sweep({"search": RATES, "scheduler": given}, max_steps=40)[1].scheduler
    settings(one, Length(120, 40, 5))
    assert not caplog.records
    settings(one, Length(40, 40, 5))
    assert "hyperband compares no trials: with max_t=1, of epoch" in caplog.text


@pytest.mark.parametrize("reduction_factor", [1.5, 2, 3, 4])
@pytest.mark.parametrize("max_t", [1, 2, 3, 4, 5, 8])
def test_hyperband_has_a_border_from_the_reduction_factor_on(max_t, reduction_factor):
    """As many trials as its first rounds hold, of which one lies in a bracket that halves."""
    found = {"time_attr": "epoch", "max_t": max_t, "reduction_factor": reduction_factor}
    ray = HyperBandScheduler(metric="m", mode="min", **found)
    for number in range(40):
        ray.on_trial_add(None, number)
    halves = any(b is not None and b._halves for band in ray._hyperbands for b in band)
    assert halves == (max_t >= reduction_factor)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ("none", 16 * 80),
        ("median", 16 * 80),
        # 16 to 5, 4 to 20, 1 to 80
        ("asha", 16 * 5 + 4 * 15 + 60),
        ({"asha": {"time_attr": "epoch"}}, 16 * 5 + 4 * 15 + 60),
        ({"asha": {"time_attr": "time_total_s"}}, 16 * 80),
        ({"asha": {"grace_period": 80}}, 16 * 80),
    ],
)
def test_halving_leaves_a_share_of_the_steps(given, steps):
    assert expected_steps(scheduler(given), [LENGTH] * 16) == steps


SHORT, LONG = Length(40, 40, 10), Length(320, 320, 5)


@pytest.mark.parametrize("lengths", [(SHORT, LONG), (LONG, SHORT)])
def test_trials_of_several_lengths_are_all_within_the_settings(lengths):
    """Whichever reports first: the longest ends it, the first evaluation of all begins it."""
    found = settings(scheduler("asha"), *lengths)
    assert (found["grace_period"], found["max_t"]) == (5, 320)
    found = settings(scheduler({"asha": {"time_attr": "epoch"}}), *lengths)
    assert (found["grace_period"], found["max_t"]) == (5 / 320, 1)
    assert settings(scheduler("hyperband"), *lengths)["max_t"] == 320
    assert settings(scheduler("median"), *lengths)["grace_period"] == 5


def test_halving_leaves_short_trials_no_more_steps_than_they_have():
    """All of both to 5, a quarter to 20, 1/16 to 80, 1/64 to 320; the short one ends at 40."""
    short = 5 + 15 / 4 + 20 / 16
    long = 5 + 15 / 4 + 60 / 16 + 240 / 64
    assert expected_steps(scheduler("asha"), [SHORT, LONG]) == pytest.approx(short + long)


def test_the_length_of_a_run_follows_from_its_keys_and_rows():
    """47 rows in steps of four are twelve an epoch, in steps of eight that are full five."""
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    base, _ = sweep(max_steps=30, **keys)
    assert length_by_rows(base, 47) == Length(30, 12, 5)
    base, _ = sweep(max_steps=-1, num_train_epochs=2, eval_steps=0.25, **keys)
    assert length_by_rows(base, 47) == Length(24, 12, 6)
    by_epoch = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    base, _ = sweep(**by_epoch, **keys)
    assert length_by_rows(base, 47) == Length(24, 12, 12)
    base, _ = sweep(**by_epoch, **keys, ray_num_workers=2, dataloader_drop_last=True)
    assert length_by_rows(base, 47) == Length(10, 5, 5)


def test_the_length_of_rows_that_are_not_known_is_that_of_max_steps():
    base, _ = sweep(max_steps=30)
    assert length_by_rows(base, None) == Length(30, 30, 5)
    base, _ = sweep(max_steps=-1)
    assert length_by_rows(base, None) is None
