"""What a sweep leaves: the order of trials, the table, the best run file, the picture."""

import csv
import io
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from sweeps import sweep, trained

from llmray.arguments.loading import load
from llmray.errors import TrainingError
from llmray.sweep import picture, results
from llmray.sweep.importance import importance
from llmray.sweep.trials import Trial, run_of
from llmray.train.observers import JsonLines

BEST = {"lora_rank": 8, "learning_rate": 1e-4}


def rows(found, ended):
    return list(csv.DictReader(io.StringIO(results.table_of(found, ended))))


def test_the_best_trial_has_the_best_metric_at_its_end():
    _, found = sweep()
    assert results.best_of(found, trained(found)).trial.values == BEST
    assert results.best_of(found, []) is None


def test_more_may_be_better():
    _, found = sweep({"search": {"lora_rank": {"grid": [4, 8]}}, "mode": "max"})
    assert results.best_of(found, trained(found)).trial.values == {"lora_rank": 4}


def test_a_trial_that_was_stopped_early_is_best_only_where_none_was_trained_to_its_end():
    _, found = sweep()
    ended = trained(found)
    ended = [replace(ended[0], curve=((20, 9.0),)), *trained(found, steps=10)[1:]]
    assert results.best_of(found, ended) is ended[0]
    assert results.best_of(found, ended[1:]).trial.values == BEST


def test_failed_trials_and_those_without_a_number_are_last():
    _, found = sweep()
    ended = trained(found)
    ended[4] = replace(ended[4], state="failed", error="lost")
    ended[3] = replace(ended[3], curve=((5, 1.0), (10, float("nan"))))
    ended[2] = replace(ended[2], curve=())
    order = [result.trial.number for result in results.ranked(found, ended)]
    assert order[-3:] == [3, 4, 5]
    assert ended[3].value(found) is None


def test_a_trial_that_ends_with_its_best_weights_is_compared_by_them():
    _, found = sweep()
    points = ((5, 2.0), (10, 1.0), (15, float("nan")), (20, 3.0))
    result = results.TrialResult(Trial(1, {}), "finished", points)
    assert result.point(found) == (20, 3.0)
    assert replace(result, ends_with_best=True).point(found) == (10, 1.0)


def test_the_table_has_a_line_a_trial_with_values_metric_state_and_cause():
    _, found = sweep({"search": {"lora_target": {"choice": [["q_proj"], "all"]}}})
    ended = trained(found)
    ended[1] = replace(ended[1], state="failed", curve=(), error="worker lost\nat line 3")
    assert rows(found, ended) == [
        {
            "trial": "trial_001",
            "state": "finished",
            "lora_target": '["q_proj"]',
            "eval_loss": str(ended[0].curve[-1][1]),
            "step": "20",
            "steps": "20",
            "seconds": "40.0",
            "error": "",
        },
        {
            "trial": "trial_002",
            "state": "failed",
            "lora_target": "all",
            "eval_loss": "",
            "step": "",
            "steps": "20",
            "seconds": "40.0",
            "error": "worker lost",
        },
    ]


def test_the_files_of_a_sweep_are_written_at_any_time(tmp_path):
    base, found = sweep(output_dir=str(tmp_path / "one"))
    waiting = [replace(result, state="waiting", curve=()) for result in trained(found)]
    folder = results.write(base, found, waiting)
    assert {path.name for path in folder.iterdir()} == {"results.csv"}
    results.write(base, found, [trained(found)[0], *waiting[1:]])
    assert {path.name for path in folder.iterdir()} == {"results.csv", "best.yaml", "tune.png"}
    assert (folder / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_run_file_trains_the_best_trial_again(tmp_path):
    base, found = sweep(output_dir=str(tmp_path / "one"), ray_run_name="mine", seed=5)
    ended = trained(found)
    path = results.write(base, found, ended) / "best.yaml"
    run, trial = load(path, environ={}), run_of(base, results.best_of(found, ended).trial)
    assert run.tune.tune is None
    assert run.training.output_dir == str(tmp_path / "one" / "best")
    assert run.cluster.ray_run_name == "mine_best"
    own = {"output_dir", "ray_run_name", "ray_storage_path"}
    assert {key for key, value in run.flat().items() if trial.flat()[key] != value} == own
    text = path.read_text()
    assert "trial_005: lora_rank=8, learning_rate=0.0001" in text
    assert "eval_loss 1.26" in text
    assert "warmup_ratio" not in text  # as it is without being written
    assert "stopped" not in text


@pytest.mark.parametrize(
    "text",
    [
        "Line one\nAnswer in French.",
        "Line one\nlearning_rate: 9",
        "a\r\nb",
        "a\x85learning_rate: 9",
        "a\u2028learning_rate: 9",
        "bell \x07",
        "joy \U0001f602\nof two lines",
    ],
)
def test_the_best_run_file_bears_texts_of_several_lines(tmp_path, text):
    search = {"default_system": {"choice": [text]}}
    base, found = sweep({"search": search}, output_dir=str(tmp_path / "one"))
    run = load(results.write(base, found, trained(found)) / "best.yaml", environ={})
    assert run.data.default_system == text
    assert run.flat()["learning_rate"] == base.flat()["learning_rate"]


def test_the_best_of_trials_that_were_stopped_says_so(tmp_path):
    base, found = sweep(output_dir=str(tmp_path / "one"))
    path = results.write(base, found, trained(found, steps=10)) / "best.yaml"
    assert "after step 10. It was stopped early: trained on, it differs." in path.read_text()


def test_a_curve_is_read_from_the_log_of_a_run(tmp_path):
    log = JsonLines(tmp_path)
    log.on_start(0, 10)
    for record in ({"loss": 3.0}, {"loss": 2.0, "eval_loss": 2.5}, {"eval_loss": 2.25}):
        log.on_log({"current_steps": len(log.path.read_text()), "total_steps": 10, **record})
    assert [value for _, value in results.read_curve(str(tmp_path), "eval_loss")] == [2.5, 2.25]
    assert results.read_curve(str(tmp_path / "none"), "eval_loss") == []


def test_the_first_cause_is_shown_where_all_trials_failed():
    _, found = sweep()
    failed = [replace(r, state="failed", curve=(), error="no disk") for r in trained(found)]
    with pytest.raises(TrainingError) as error:
        results.refuse_failure(failed)
    assert str(error.value).startswith("all 6 trials failed. trial_001: no disk")
    assert str(error.value).count("no disk") == 1
    with pytest.raises(TrainingError, match="1 other causes stand in"):
        results.refuse_failure([*failed[:5], replace(failed[5], error="other")])
    results.refuse_failure([trained(found)[0], *failed[1:]])
    results.refuse_failure([])


def test_a_disk_that_is_full_is_said_with_the_folder(tmp_path, monkeypatch):
    base, found = sweep(output_dir=str(tmp_path / "one"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmray.store.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        results.write(base, found, trained(found))
    assert str(tmp_path) in str(error.value)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(picture, "save", lambda figure, path: saved.append(figure))
    return saved


def drawn(base, found, ended, figures):
    picture.draw(found, results.ranked_columns(found, ended), "tune.png")
    return figures[-1].axes


def test_the_picture_has_curves_coordinates_and_importance(figures, tmp_path):
    base, found = sweep()
    ended = trained(found)
    curves, coordinates, shares = drawn(base, found, ended, figures)
    assert [len(line.get_xdata()) for line in curves.get_lines()] == [4] * 6
    labels = [text.get_text() for text in curves.get_legend().get_texts()]
    assert labels[0] == "trial_005  8, 0.0001"
    assert len(labels) == 6
    keys = [label.get_text() for label in coordinates.get_xticklabels()]
    assert keys == ["lora_rank", "learning_rate", "eval_loss"]
    best = coordinates.get_lines()[5]  # drawn last of the trials
    assert list(best.get_ydata()) == pytest.approx([1.0, 0.5, 0.0])  # of rates by the logarithm
    assert [label.get_text() for label in shares.get_yticklabels()] == [
        "learning_rate",
        "lora_rank",
    ]
    assert "trial_005" in figures[-1].get_suptitle()


def test_the_picture_bears_values_of_any_kind_and_many_trials(figures):
    section = {
        "search": {
            "lora_target": {"choice": ["all", ["q_proj", "v_proj"]], "when": {"lora_rank": 4}},
            "lora_rank": {"choice": [4, 8]},
            "use_dora": {"choice": [True, False]},
            "warmup_ratio": {"uniform": [0, 0.3]},
        },
        "num_samples": 14,
    }
    base, found = sweep(section)
    curves, _, shares = drawn(base, found, trained(found), figures)
    assert len(curves.get_legend().get_texts()) == 1
    assert len(shares.patches) == 4


def test_one_trial_is_drawn_too(figures):
    base, found = sweep({"search": {"lora_rank": {"grid": [4]}}})
    assert len(drawn(base, found, trained(found), figures)[0].get_lines()) == 1


def test_evaluations_may_lie_at_other_steps_in_each_trial(figures):
    """Ranks 4 evaluate at 320, ranks 8 at 40: the last of each are 3, 3, 3, 1, 1, 1."""
    base, found = sweep()
    ended = [
        replace(r, curve=((320, 3.0),) if r.trial.values["lora_rank"] == 4 else ((40, 1.0),))
        for r in trained(found)
    ]
    shares = drawn(base, found, ended, figures)[2]
    assert "after each trial's last evaluation" in shares.get_xlabel()
    widths = dict(
        zip((t.get_text() for t in shares.get_yticklabels()), shares.patches, strict=True)
    )
    assert widths["lora_rank"].get_width() == 1


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    base, found = sweep(output_dir=str(tmp_path / "one"))

    def broken(*args):
        raise IndexError("list index out of range")

    monkeypatch.setattr(picture, "draw", broken)
    with caplog.at_level("WARNING", logger="llmray"):
        folder = results.write(base, found, trained(found))
    assert {path.name for path in folder.iterdir()} == {"results.csv", "best.yaml"}
    assert "tune.png is not drawn: IndexError" in caplog.text


def test_importance_is_the_share_of_variance_between_values():
    """Metrics 0, 0, 0, 3, 3, 3 by a: all variance lies between a's groups; b's share is chance's.

    Of b with metrics (0, 3), (0, 3), (0, 3) the groups have the same mean: nothing is explained.
    With 0, 1, 0, 3, 4, 3 by a: within 4/3 of a total of 89/6 over 4 and 5 degrees of freedom leaves
    1 - (4/3 / 4) / (89/6 / 5) = 0.888.
    """
    values = [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y", "z")]
    found = importance(["a", "b"], values, [0, 0, 0, 3, 3, 3])
    assert found == {"a": 1.0, "b": 0.0}
    shares = importance(["a"], values, [0, 1, 0, 3, 4, 3])
    assert shares["a"] == pytest.approx(1 - (4 / 3 / 4) / (89 / 6 / 5))


def test_importance_of_drawn_numbers_is_that_of_their_quantiles():
    values = [{"a": 0.01 * number, "b": (number * 7) % 20 / 3} for number in range(20)]
    found = importance(["a", "b"], values, [float(number) for number in range(20)])
    assert found["a"] > 0.8
    assert found["b"] < 0.3


def test_importance_of_too_few_trials_is_nothing():
    assert importance(["a"], [{"a": 1}, {"a": 2}], [1.0, 2.0]) == {"a": 0.0}
    assert importance(["a"], [{"a": n % 2} for n in range(4)], [1.0] * 4) == {"a": 0.0}
