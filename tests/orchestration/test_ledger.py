"""The ledger: what a sweep writes, and what the next driver makes of it."""

import json

import pytest

from llmray.arguments.loading import load
from llmray.errors import CheckpointError, StoreError
from llmray.orchestration import ledger
from llmray.orchestration.ledger import Entry
from llmray.orchestration.verdicts import Report

KEYS = {"model_name_or_path": "m", "dataset": "d", "template": "default", "stage": "sft"}
SECTION = {"search": {"learning_rate": {"uniform": [1e-5, 1e-3]}}, "num_samples": 3}


def arguments(tune=SECTION, **keys):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "val_size": 2, "do_train": True}
    return load({**KEYS, **evaluated, "output_dir": "o", "tune": tune, **keys}, environ={})


def entry(directory, number, state, **given):
    name = f"trial_{number:03d}"
    made = Entry(number, name, {"learning_rate": 1e-4}, str(directory / name), state, **given)
    made.write()
    return made


def test_an_entry_reads_back_equal(tmp_path):
    reports = [Report(2, 0.5, 1.5, 3.25), Report(4, 1.0, 3.0, 3.0)]
    made = entry(tmp_path, 1, "stopped", reports=reports, orders=[1, 4], metric=3.0, cause="asha")
    assert ledger.read(made.run_dir) == made
    assert ledger.read(str(tmp_path / "trial_002")) is None


def test_an_entry_may_lie_behind_a_uri(tmp_path):
    made = Entry(1, "trial_001", {}, f"file://{tmp_path}/trial_001")
    made.write()
    assert ledger.read(made.run_dir) == made


def test_reports_that_come_again_are_dropped(tmp_path):
    reports = [Report(step, 0.0, 0.0, 1.0) for step in (2, 4, 6)]
    made = entry(tmp_path, 1, "running", reports=reports, orders=[1, 3, 5])
    made.forget_after(4)
    assert [report.step for report in made.reports] == [2, 4]
    assert made.orders == [1, 3]


@pytest.mark.parametrize("text", ["{", '{"version": 0}', "[]"])
def test_a_damaged_entry_is_said(tmp_path, text):
    made = entry(tmp_path, 1, "done")
    (tmp_path / "trial_001" / "trial.json").write_text(text)
    with pytest.raises(StoreError, match=r"trial.json cannot be read .* to begin anew"):
        ledger.read(made.run_dir)


def test_a_second_sweep_in_one_folder_is_refused(tmp_path):
    ledger.begin(str(tmp_path), arguments())
    entry(tmp_path, 1, "done")
    entry(tmp_path, 2, "running")
    with pytest.raises(CheckpointError, match=r"2 trials, of which 1 are over. Write resume=true"):
        ledger.begin(str(tmp_path), arguments())


def test_overwriting_moves_the_earlier_one_aside(tmp_path):
    made = entry(tmp_path, 1, "done")
    (tmp_path / "trial_001" / "trainer_log.jsonl").write_text("{}\n")
    ledger.begin(str(tmp_path), arguments(overwrite_output_dir=True))
    assert ledger.read(made.run_dir) is None
    assert (tmp_path / "trial_001" / ".replaced" / "trainer_log.jsonl").is_file()


@pytest.mark.parametrize("is_one_place", [True, False])
def test_overwriting_leaves_no_result_of_the_earlier_one(tmp_path, is_one_place):
    run_dir, out = tmp_path / "run", tmp_path / ("run" if is_one_place else "out")
    made = entry(run_dir, 1, "done")
    (out / "trial_007").mkdir(parents=True)
    (out / "trial_007" / "model.safetensors").write_text("weights")
    (out / "trial_001").mkdir(exist_ok=True)
    for name in ("trial_001/trial.log", "results.csv", "best.yaml", "tune.png", "notes.txt"):
        (out / name).write_text("old")
    for _ in range(2):
        ledger.begin(str(run_dir), arguments(overwrite_output_dir=True, output_dir=str(out)))
        left = {path.name for path in out.iterdir()} - {"sweep.json"}
        assert left == {".replaced", "notes.txt"}, "the user's own stays"
        kept = {str(path.relative_to(out / ".replaced")) for path in out.glob(".replaced/**/*.*")}
        assert kept >= {"results.csv", "trial_001/trial.log", "trial_007/model.safetensors"}
        assert ledger.read(made.run_dir) is None


def test_without_overwriting_results_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("mine")
    ledger.begin(str(tmp_path / "run"), arguments(output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "results.csv").read_text() == "mine"


def test_going_on_keeps_what_is_over_and_tries_the_rest(tmp_path):
    ledger.begin(str(tmp_path), arguments())
    for number, state in enumerate(("done", "stopped", "failed", "running", "paused"), 1):
        entry(tmp_path, number, state, failures=2)
    found = ledger.resume(str(tmp_path), arguments(), "eval_loss")
    states = [found[name].state for name in sorted(found)]
    assert states == ["done", "stopped", "pending", "pending", "paused"]
    assert found["trial_003"].failures == 0
    assert found["trial_004"].attempts == 1, "so that a worker takes its checkpoint as its own"


def test_what_had_no_more_time_goes_on_from_its_checkpoint(tmp_path):
    ledger.begin(str(tmp_path), arguments({**SECTION, "time_budget_s": 5}))
    entry(tmp_path, 1, "stopped", cause="asha: eval_loss 3 after step 2", step=2)
    entry(tmp_path, 2, "stopped", cause="time_budget_s", step=4, attempts=1, is_left=True)
    more = arguments({**SECTION, "time_budget_s": 50})
    found = ledger.resume(str(tmp_path), more, "eval_loss")
    assert [found[name].state for name in sorted(found)] == ["stopped", "pending"]
    again = found["trial_002"]
    assert (again.cause, again.attempts, again.step) == (None, 1, 4)


def test_an_end_that_the_driver_did_not_live_to_see_counts(tmp_path):
    ledger.begin(str(tmp_path), arguments())
    made = entry(tmp_path, 1, "running", step=6, total_steps=8)
    log = {"current_steps": 8, "total_steps": 8}
    (tmp_path / "trial_001" / "trainer_log.jsonl").write_text(json.dumps(log) + "\n")
    (tmp_path / "trial_001" / "all_results.json").write_text('{"eval_loss": 1.5}')
    found = ledger.resume(str(tmp_path), arguments(), "eval_loss")
    assert (found[made.name].state, found[made.name].metric) == ("done", 1.5)


def test_another_sweep_is_not_gone_on_with(tmp_path):
    ledger.begin(str(tmp_path), arguments())
    more = arguments({**SECTION, "num_samples": 9, "time_budget_s": 5}, ray_max_failures=1)
    assert ledger.resume(str(tmp_path), more, "eval_loss") == {}
    with pytest.raises(CheckpointError, match=r"another sweep: lora_rank 8 there, 4 here"):
        ledger.resume(str(tmp_path), arguments(lora_rank=4), "eval_loss")
    with pytest.raises(CheckpointError, match=r"another sweep: tune .*seed"):
        ledger.resume(str(tmp_path), arguments({**SECTION, "seed": 3}), "eval_loss")


def test_another_searcher_that_follows_from_another_number_is_another_sweep(tmp_path):
    listed = {"search": {"lora_rank": {"choice": [4, 8]}}}
    ledger.begin(str(tmp_path), arguments({**listed, "num_samples": 1}))
    assert ledger.resume(str(tmp_path), arguments({**listed, "num_samples": 2}), "eval_loss") == {}
    named = arguments({**listed, "num_samples": 2, "searcher": "random"})
    assert ledger.resume(str(tmp_path), named, "eval_loss") == {}
    with pytest.raises(CheckpointError, match=r"'random'.* there, .*'grid'.* here"):
        ledger.resume(str(tmp_path), arguments(listed), "eval_loss")


def test_going_on_with_nothing_is_a_beginning(tmp_path):
    assert ledger.resume(str(tmp_path), arguments(), "eval_loss") == {}
    assert (tmp_path / "sweep.json").is_file()
