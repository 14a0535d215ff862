"""The driver of a sweep without a cluster: how many trials at a time, lines, what outputs show."""

import json
import logging

import pytest

from llmray import store
from llmray.arguments import reward_sets
from llmray.arguments.loading import load
from llmray.arguments.tune import sweep_of
from llmray.data.prepared import PreparedRef
from llmray.errors import ClusterError, RewardError
from llmray.orchestration import actors, tune_job
from llmray.orchestration.board import Message
from llmray.orchestration.ledger import Entry
from llmray.orchestration.plan import Inventory, Node, left_beside
from llmray.orchestration.reward_actor import Seat
from llmray.orchestration.searching import Listed
from llmray.orchestration.train_job import DriverSignals
from llmray.orchestration.verdicts import Report
from llmray.sweep.trials import run_of, runs_by_rewards, trials_of

SEARCH = {"learning_rate": {"grid": [1e-4, 1e-3]}}


def driver(tmp_path, cores=4, gpus=0, tune=None, **keys):
    base = {
        "model_name_or_path": "m",
        "dataset": "d",
        "template": "default",
        "stage": "sft",
        "do_train": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "val_size": 2,
        "output_dir": str(tmp_path / "out"),
        "ray_storage_path": str(tmp_path / "saves"),
        "tune": {"search": SEARCH, **(tune or {})},
    }
    arguments = load({**base, **keys}, environ={})
    made = tune_job._Driver(arguments, sweep_of(arguments), DriverSignals(), True, None)
    resources = {"CPU": float(cores), **({"GPU": float(gpus)} if gpus else {})}
    made.inventory = Inventory((Node("1", "10.0.0.1", resources),), resources)
    return made


@pytest.mark.parametrize(
    ("given", "resources", "at_once"),
    [
        ({}, {"CPU": 4.0}, 1),
        ({"tune": {"max_concurrent": 2}}, {"CPU": 2.0}, 2),
        ({"tune": {"max_concurrent": 3}}, {"CPU": 1.0}, 3),
        ({"tune": {"max_concurrent": 9}}, {"CPU": 1.0}, 4),
        ({"resources_per_worker": {"CPU": 1}}, {"CPU": 1.0}, 4),
        ({"resources_per_worker": {"CPU": 1}, "ray_num_workers": 2}, {"CPU": 1.0}, 2),
        ({"ray_num_workers": 2, "tune": {"max_concurrent": 2}}, {"CPU": 1.0}, 2),
        ({"gpus": 8}, {"GPU": 1.0}, 8),
        ({"gpus": 8, "ray_num_workers": 3}, {"GPU": 1.0}, 2),
        ({"gpus": 8, "tune": {"max_concurrent": 4}}, {"GPU": 1.0}, 4),
        ({"gpus": 1, "use_cpu": True, "tune": {"max_concurrent": 2}}, {"CPU": 2.0}, 2),
    ],
)
def test_trials_at_a_time_follow_from_resources(tmp_path, given, resources, at_once):
    found = driver(tmp_path, **given)
    placement = found._placement(found.arguments)
    assert placement.resources == resources
    assert not any("uses all" in note for note in placement.notes), "other trials take the rest"
    assert found._at_once(placement) == at_once


def test_a_trial_keeps_its_lines_and_a_warning_is_shown_once(tmp_path, caplog):
    found = driver(tmp_path)
    entries = [Entry(n, f"trial_00{n}", {}, str(tmp_path)) for n in (1, 2)]
    record = {"current_steps": 2, "total_steps": 4, "eval_loss": 1.5, "remaining_time": "0:00:01"}
    with caplog.at_level(logging.INFO, "llmray"):
        for entry in entries:
            found._heard(entry, Message("log", (logging.INFO, "reading")))
            found._heard(entry, Message("log", (logging.WARNING, "few rows")))
            found._heard(entry, Message("record", (record,)))
    assert caplog.messages == ["trial_001: few rows"]
    text = (tmp_path / "out" / "trial_002" / "trial.log").read_text()
    assert text == "reading\nwarning: few rows\nstep 2/4, eval_loss 1.5000, ETA 0:00:01\n"


def test_what_outputs_show_of_an_entry():
    reports = [Report(2, 0.5, 1, 3.0), Report(4, 1.0, 2, 2.5)]
    entry = Entry(1, "trial_001", {"x": 1}, "r", "done", 4, 4, reports, [1, 2], metric=2.5)
    shown = tune_job._result(entry)
    assert (shown.state, shown.curve, shown.error) == ("finished", ((2, 3.0), (4, 2.5)), None)
    entry.metric = 3.0  # of the best weights, put back at the end
    assert tune_job._result(entry).curve == ((2, 3.0), (4, 3.0))
    entry.state, entry.cause = "failed", "loss=nan"
    assert (tune_job._result(entry).state, tune_job._result(entry).error) == ("failed", "loss=nan")
    entry.state, entry.cause = "stopped", "time_budget_s"
    assert tune_job._result(entry).state == "out of time"


def test_an_end_that_the_driver_did_not_live_to_see_leaves_its_files(tmp_path):
    """The workers wrote all of it to storage, and the driver was gone before it looked."""
    found = driver(tmp_path, cores=1)
    found._open_ledger(resumes=False)
    entry = found.entries["trial_001"]
    entry.state = "running"
    entry.write()
    record = {"current_steps": 4, "total_steps": 4, "eval_loss": 1.5}
    for name, text in (
        ("trainer_log.jsonl", json.dumps(record)),
        ("all_results.json", '{"eval_loss": 1.5}'),
        ("model.safetensors", "weights"),
    ):
        store.write_atomic(store.join(entry.run_dir, name), text)
    again = driver(tmp_path, cores=1)
    again._open_ledger(resumes=True)
    again.entries = {"trial_001": again.entries["trial_001"]}
    again._loop(Listed()).run()
    assert again.entries["trial_001"].state == "done"
    assert (tmp_path / "out" / "trial_001" / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_fewer_samples_leave_out_what_has_not_begun(tmp_path, searcher):
    search = {"learning_rate": {"uniform": [1e-4, 1e-3]}}

    def opened(number, resumes):
        tune = {"search": search, "searcher": searcher, "num_samples": number}
        found = driver(tmp_path, tune=tune)
        found._open_ledger(resumes=resumes)
        return found

    first = opened(6, False)
    while len(first.entries) < 6:
        entry = first._new_entry({"learning_rate": 2e-4 + 1e-4 * len(first.entries)})
        first.entries[entry.name] = entry
    for name, state in (("trial_001", "done"), ("trial_004", "paused")):
        first.entries[name].state = state
        first.entries[name].attempts = 1
    for entry in first.entries.values():
        entry.write()
    again = opened(2, True).entries
    assert [e.name for e in again.values() if e.has_begun] == ["trial_001", "trial_004"]
    waiting = [e.name for e in again.values() if not e.has_begun]
    assert waiting == (["trial_002"] if searcher == "random" else ["trial_002", "trial_003"])
    if searcher == "random":
        more = opened(6, True).entries
        assert {n: e.values for n, e in more.items()} == {
            n: e.values for n, e in first.entries.items()
        }


@pytest.mark.parametrize(
    ("searcher", "search", "keys", "end", "first"),
    [
        # 320 rows in steps of 8 are 40 an epoch
        ("grid", {"per_device_train_batch_size": {"grid": [8, 1]}}, {}, 320, 4),
        ("grid", {"max_steps": {"grid": [20, 160]}, "eval_steps": {"grid": [10, 2]}}, {}, 160, 2),
        ("grid", SEARCH, {"max_steps": 12}, 12, 4),
        ("optuna", {"per_device_train_batch_size": {"randint": [1, 8]}}, {}, 320, 4),
        (
            "optuna",
            {
                "per_device_train_batch_size": {"choice": [8, 1]},
                "num_train_epochs": {"choice": [1, 3]},
                "learning_rate": {"uniform": [1e-5, 1e-4]},
            },
            {},
            960,
            4,
        ),
    ],
)
def test_a_scheduler_covers_the_longest_trial_and_the_first_evaluation(
    tmp_path, searcher, search, keys, end, first
):
    given = {"gradient_accumulation_steps": 1, "num_train_epochs": 1, "eval_steps": 4, **keys}
    tune = {"search": search, "scheduler": "asha", "searcher": searcher}
    found = driver(tmp_path, tune=tune, **given)
    found._data = lambda run: PreparedRef("p", "k", 320, 2, 1, 1)
    found._open_ledger(resumes=False)
    if searcher == "optuna":
        found.entries["trial_001"] = found._new_entry({"per_device_train_batch_size": 8})
    settings = found._settings()
    assert (settings["grace_period"], settings["max_t"]) == (first, end)


PPO = {
    "stage": "ppo",
    "do_sample": True,
    "reward_model": "saves/rm",
    "reward_model_type": "full",
    "reward_resources_per_actor": {"CPU": 1},
}


def with_rewards(tmp_path, search=SEARCH, **keys):
    """A driver that has placed its reward models and not made them."""
    tune = {"search": search, **keys.pop("tune", {})}
    found = driver(tmp_path, **{**PPO, "tune": tune, **keys})
    sets = reward_sets.of_runs(runs_by_rewards(found.arguments, found.sweep))
    found.roles = actors.roles_of(sets)
    return found, sets


@pytest.mark.parametrize(
    ("given", "resources", "at_once"),
    [
        ({}, {"CPU": 3.0}, 1),
        ({"reward_num_actors": 2, "tune": {"max_concurrent": 2}}, {"CPU": 1.0}, 2),
        ({"resources_per_worker": {"CPU": 1}}, {"CPU": 1.0}, 3),
        ({"resources_per_worker": {"CPU": 1}, "reward_num_actors": 3}, {"CPU": 1.0}, 1),
    ],
)
def test_reward_models_take_their_share_before_trials(tmp_path, given, resources, at_once):
    found, _ = with_rewards(tmp_path, **given)
    placement = found._placement(found.arguments)
    assert placement.resources == resources
    seats = [node_id for role in placement.roles for node_id in role.node_ids]
    found.room = left_beside(placement.roles, found.inventory, seats)
    later = found._placement(found.arguments)
    assert (later.resources, later.roles) == (resources, ())
    assert found._at_once(later) == at_once


def test_fewer_cores_than_reward_models_and_one_trial_are_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_job.train_job, "check_nodes", lambda *words: pytest.fail("too late"))
    found, _ = with_rewards(tmp_path, reward_num_actors=4)
    with pytest.raises(ClusterError, match=r'needs \{"CPU": 5\} for 1 worker with .* 4 actors of'):
        found._check()
    search = {**SEARCH, "template": {"grid": ["default", "chatml"]}}
    found, sets = with_rewards(tmp_path, search, reward_num_actors=2)
    assert [one.apart for one in sets] == [" (template=default)", " (template=chatml)"]
    with pytest.raises(ClusterError, match="Trials differ in template, so that each value has"):
        found._check()
    assert not (tmp_path / "saves").exists()


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_more_workers_than_there_is_room_for_are_said_first(tmp_path, monkeypatch, searcher):
    monkeypatch.setattr(tune_job.train_job, "check_nodes", lambda *words: pytest.fail("too late"))
    workers = {"choice": [1, 2, 5]}
    search = {"learning_rate": {"uniform": [1e-4, 1e-3]}, "ray_num_workers": workers}
    tune = {"search": search, "searcher": searcher, "num_samples": 3}
    found = driver(tmp_path, tune=tune, resources_per_worker={"CPU": 1})
    with pytest.raises(ClusterError, match=r"needs 5 CPU \(5 workers with 1 each\)"):
        found._check()


def test_a_trial_gets_the_actors_of_its_own_reward_models(tmp_path):
    search = {
        **SEARCH,
        "reward_model": {"grid": ["saves/rm", "saves/other", "saves/rm,saves/other"]},
    }
    found, sets = with_rewards(tmp_path, search)
    made = actors.Actors([Seat(s.name, 0, None, {}, None, s.key, s.apart) for s in sets])
    runs = [run_of(found.arguments, trial) for trial in trials_of(found.sweep)]
    names = [[seat.title for seat in made.seats_of(run)] for run in runs]
    each = [["saves/rm[0]"], ["saves/other[0]"], ["saves/rm[0]", "saves/other[0]"]]
    assert sorted(names) == sorted(each * 2)
    made.seats.pop()
    with pytest.raises(RewardError, match="No actors were made of reward model saves/other"):
        made.seats_of(runs[-1])


def test_an_actor_that_hangs_is_killed_whichever_trial_says_so(tmp_path, monkeypatch):
    found, sets = with_rewards(tmp_path)
    killed = []
    monkeypatch.setattr(actors.ray, "kill", lambda actor, no_restart: killed.append(actor))
    found.rewards = actors.Actors([Seat("saves/rm", n, n, {}, None, sets[0].key) for n in (0, 1)])
    for number in (1, 2):
        entry = Entry(number, f"trial_00{number}", {}, str(tmp_path))
        found._heard(entry, Message("hung", ("saves/rm[1]", 77)))
    assert killed == [1]
