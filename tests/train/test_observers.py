"""Observers: the log file over a resume, the console's lines and its curve."""

import io
import json

import pytest

from llmray.arguments.training import TrainingArguments
from llmray.train.observers import Console, JsonLines, read_log


def record(step, **extra):
    times = {"elapsed_time": "0:00:01", "remaining_time": "0:00:09"}
    return {
        "current_steps": step,
        "total_steps": 10,
        "loss": 1.0 / step,
        "lr": 0.1,
        **times,
        "tokens_per_second": 5.0,
        **extra,
    }


def test_resumed_log_drops_the_steps_that_are_repeated(tmp_path):
    first = JsonLines(tmp_path)
    first.on_start(0, 10)
    for step in (1, 2, 3, 4):
        first.on_log(record(step))
    second = JsonLines(tmp_path)
    second.on_start(2, 10)
    second.on_log(record(3, again=True))
    steps = [(r["current_steps"], r.get("again")) for r in read_log(tmp_path / "trainer_log.jsonl")]
    assert steps == [(1, None), (2, None), (3, True)]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2))[:20])
    assert [r["current_steps"] for r in read_log(path)] == [1]


def test_console_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    Console(stream).on_log(record(2, eval_loss=0.25))
    expected = "step 2/10, loss 0.5000, lr 0.1, 5 tokens/s, eval_loss 0.2500, ETA 0:00:09\n"
    assert stream.getvalue() == expected


def test_console_ends_with_the_curve_of_the_losses_that_were_kept():
    """A second attempt begins after step 3: what the first one logged of steps 4 and 5 goes."""
    stream = io.StringIO()
    console = Console(stream)
    console.on_start(0, 10)
    for step in (1, 2, 3, 4, 5):
        console.on_log(record(step, loss=float(step)))
    console.on_start(3, 10)
    console.on_log(record(4, loss=0.5))
    stream.truncate(0)
    console.on_end({})
    drawn = stream.getvalue().strip("\0\n").splitlines()
    assert drawn[0].startswith("  3 |")
    assert drawn[-3].startswith("0.5 |")
    assert drawn[-1].endswith("loss to step 4")


def test_console_draws_nothing_of_a_single_step():
    stream = io.StringIO()
    console = Console(stream)
    console.on_log(record(1))
    stream.truncate(0)
    console.on_end({})
    assert stream.getvalue().strip("\0") == ""


@pytest.mark.parametrize(("disabled", "draws"), [(None, False), (True, False), (False, True)])
def test_disable_tqdm_chooses_the_line(disabled, draws, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    console = Console.of(TrainingArguments(disable_tqdm=disabled))
    console.on_log(record(2))
    assert ("[####" in stream.getvalue()) == draws
