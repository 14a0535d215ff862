"""A sweep on the terminal: the table and the line of progress."""

from dataclasses import replace

from sweeps import sweep, trained

from llmray.sweep import report


def test_the_table_has_the_best_first_and_marked():
    _, found = sweep()
    ended = trained(found)
    ended[0] = replace(ended[0], state="failed", curve=(), steps=7)
    lines = report.table(found, ended).splitlines()
    assert lines[0].split() == [
        *("trial", "lora_rank", "learning_rate", "eval_loss", "step", "state", "seconds"),
    ]
    assert lines[1].split() == [
        "trial_005",
        "*",
        "8",
        "0.0001",
        "1.26034",
        "20/20",
        "finished",
        "40",
    ]
    assert lines[-1].split() == ["trial_001", "4", "1e-05", "-", "7/20", "failed", "40"]
    assert len({line.rindex(" ") for line in lines[1:]}) == 1  # seconds stand under one another


def test_long_values_are_cut_and_missing_ones_left_empty():
    section = {
        "search": {
            "lora_target": {"choice": ["q_proj,k_proj,v_proj,o_proj,up_proj"]},
            "lora_rank": {"choice": [4], "when": {"lora_target": "all"}},
        }
    }
    section["search"]["lora_target"]["choice"].append("all")
    _, found = sweep(section)
    lines = report.table(found, trained(found)).splitlines()
    assert any("q_proj,k_proj,v_proj,o_…  " in line for line in lines)


def test_a_text_of_several_lines_is_one_cell():
    texts = ["one\ntwo\u2028three", "a\x85b"]
    _, found = sweep({"search": {"default_system": {"choice": texts}}})
    lines = report.table(found, trained(found)).splitlines()
    assert len(lines) == 3
    for said in (r" a\u0085b ", r" one\ntwo\u2028three "):
        assert sum(said in line for line in lines) == 1


def test_trials_that_are_as_good_as_the_best_are_named():
    _, found = sweep()
    ended = trained(found)
    assert report.ties(found, ended) is None
    assert report.ties(found, []) is None
    best = ended[4].curve
    ended[0] = replace(ended[0], curve=best)
    ended[5] = replace(ended[5], curve=best)
    ended[1] = replace(ended[1], curve=best, state="stopped early")
    assert report.ties(found, ended) == "as good as trial_001: trial_005, trial_006"


def test_progress_says_what_ended_what_runs_what_is_best_and_what_is_left():
    """Six trials of 20 steps: 20 + 10 done in 60 s, so 2 s a step; a trial is as long as those that
    ended, 15 steps on average. One runs at 5: 10 steps; three wait: 45. 55 steps are 110 s at the
    rate of 35 steps in 70 s.
    """
    _, found = sweep()
    one, two = trained(found)[0], trained(found, steps=10)[1]
    three = replace(trained(found, steps=5)[2], state="running")
    line = report.progress(found, [one, two, three], elapsed_s=70, num_trials=6)
    assert line == (
        "2 of 6 trials (1 stopped early), 1 running, best eval_loss 1.4853 (trial_001), ETA 0:01:50"
    )


def test_steps_of_an_earlier_driver_tell_nothing_of_the_rate():
    _, found = sweep()
    ended = trained(found)[:1]
    line = report.progress(found, ended, elapsed_s=10, num_trials=2, steps_before=10)
    assert line.endswith("ETA 0:00:20")


def test_the_time_that_is_left_is_not_known_before_the_first_step_and_none_at_the_end():
    _, found = sweep()
    waiting = [replace(r, state="waiting", steps=0, curve=()) for r in trained(found)]
    assert report.progress(found, waiting, elapsed_s=10) == "0 of 6 trials, ETA unknown"
    assert report.progress(found, trained(found), elapsed_s=10).endswith("ETA 0:00:00")


def test_failed_trials_are_counted():
    _, found = sweep()
    ended = [replace(result, state="failed", curve=()) for result in trained(found)]
    assert "6 of 6 trials (6 failed), ETA" in report.progress(found, ended, elapsed_s=1)
