"""Schedulers and searchers of sweeps on real workers, each with some tiny trials to the end."""

import csv
import json
import re

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEYS = {
    "ray_num_workers": 1,
    "gradient_accumulation_steps": 1,
    "val_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 8,
    "save_steps": 8,
}


def swept(launch, ray_address, name, tune, **keys):
    """A finished sweep: its run, and the rows of results.csv by trial."""
    keys = {**KEYS, **keys, "tune": {"max_concurrent": 2, **tune}}
    run = launch(name, address=ray_address, command="tune", **keys)
    assert run.finish(timeout=900) == 0, run.text
    assert "Traceback" not in run.text
    with open(run.output_dir / "results.csv") as file:
        return run, {row["trial"]: row for row in csv.DictReader(file)}


def steps(run, name):
    path = run.run_dir / name / "trainer_log.jsonl"
    return [json.loads(line)["current_steps"] for line in path.read_text().splitlines()]


def attempts(run, name):
    return len(re.findall(r"attempt \d+: ", (run.output_dir / name / "trial.log").read_text()))


def test_hyperband_pauses_trials_and_lets_the_best_go_on_from_their_checkpoints(
    launch, ray_address
):
    """Of 8 steps and a factor of 3, three trials are the bracket that goes to the end at once.

    The other five pause at their first evaluation after 2 steps, and the only one that learns is
    better than the other four.
    """
    rates = [1e-9, 2e-9, 3e-9, 1e-3, 4e-9, 5e-9, 6e-9, 7e-9]
    tune = {
        "search": {"learning_rate": {"grid": rates}},
        "scheduler": {"hyperband": {"reduction_factor": 3}},
    }
    run, found = swept(launch, ray_address, "hyperband", tune)
    states = [found[f"trial_{number:03d}"]["state"] for number in range(1, 9)]
    assert states[:4] == ["finished"] * 4, run.text
    assert set(states[4:]) <= {"finished", "stopped early"}
    assert "stopped early" in states[4:], run.text
    for name in found:
        logged = steps(run, name)
        assert logged == sorted(set(logged)), "no step is trained twice"
        number = int(name[-3:])
        assert attempts(run, name) > 1 or number != 4, "nothing was paused and went on"
        assert attempts(run, name) == 1 or number > 3
    assert "trial_004 *" in run.text, "the best of all is one that was compared"
    assert steps(run, "trial_004")[-1] == 8


def test_median_rule_stops_what_stays_behind(launch, ray_address):
    rates = [1e-3, 2e-3, 3e-3, 1e-9, 2e-9]
    tune = {
        "search": {"learning_rate": {"grid": rates}},
        "scheduler": {"median": {"grace_period": 2, "min_samples_required": 2}},
        "max_concurrent": 1,
    }
    run, found = swept(launch, ray_address, "median", tune)
    states = [found[f"trial_{number:03d}"]["state"] for number in range(1, 6)]
    assert states[0] == "finished", run.text
    assert states[3:] == ["stopped early"] * 2, run.text
    assert max(steps(run, "trial_004")) < 8


def test_optuna_proposes_as_many_trials_as_asked_and_goes_on_with_more(launch, ray_address):
    tune = {
        "search": {"learning_rate": {"loguniform": [1e-6, 1e-2]}},
        "searcher": "optuna",
        "num_samples": 3,
    }
    run, found = swept(launch, ray_address, "optuna", tune)
    assert [row["state"] for row in found.values()] == ["finished"] * 3
    rates = {name: row["learning_rate"] for name, row in found.items()}
    assert len(set(rates.values())) == 3
    more = {**KEYS, "tune": {"max_concurrent": 2, **tune, "num_samples": 4}}
    again = launch("optuna", address=ray_address, command="tune", words=["resume=true"], **more)
    assert again.finish(timeout=900) == 0, again.text
    with open(run.output_dir / "results.csv") as file:
        later = {row["trial"]: row for row in csv.DictReader(file)}
    assert [row["state"] for row in later.values()] == ["finished"] * 4
    assert {name: later[name]["learning_rate"] for name in rates} == rates
    assert all(attempts(run, name) == 1 for name in later), "no finished trial runs twice"
