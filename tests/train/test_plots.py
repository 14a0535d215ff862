"""Pictures: which are drawn, what stands in them, and what is said of keys that have none."""

import logging
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from llmray.errors import ArgumentsError
from llmray.train import plots
from llmray.train.observers import JsonLines
from llmray.train.plots import Plots, draw_runs, file_name, read_curves, smooth


def write_log(directory: Path, records: list[dict[str, float]]) -> Path:
    directory.mkdir(exist_ok=True)
    log = JsonLines(directory)
    log.on_start(0, 10)
    for step, record in enumerate(records, start=1):
        log.on_log({"current_steps": step, "total_steps": 10, **record, "elapsed_time": "0:01"})
    return directory


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = plots.save

    def note(figure: Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save", note)
    return saved


def lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The points of each line by its label."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in figure.axes[0].lines
    }


def test_loss_and_evaluations_are_drawn_and_named_keys_besides(tmp_path):
    records = [{"loss": 1.0, "lr": 0.1, "rewards/chosen": 0.5}, {"loss": 0.5, "eval_loss": 0.4}]
    records.append({"eval_a_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 3.0})
    records[-1] |= {"eval_rewards/margins": 0.1, "eval_rewards/accuracies": 0.6, "eval_kl": 0.0}
    Plots(write_log(tmp_path, records), ["rewards/chosen"]).on_end({})
    pictures = {path.name for path in tmp_path.glob("*.png")}
    keys = ("loss", "eval_loss", "eval_a_loss", "eval_accuracy", "rewards_chosen")
    keys += ("eval_rewards_margins", "eval_rewards_accuracies")
    assert pictures == {f"training_{key}.png" for key in keys}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_picture_has_the_values_and_their_smoothing(tmp_path, figures):
    """A neighbour weighs 0.2: 8 and 2 become (8 + 0.4) / 1.2 = 7 and (1.6 + 2) / 1.2 = 3."""
    Plots(write_log(tmp_path, [{"loss": 8.0}, {"loss": 2.0}])).on_end({})
    drawn = lines(figures[0])
    assert drawn["loss"] == [(1, 8.0), (2, 2.0)]
    assert [value for _, value in drawn["smoothed"]] == pytest.approx([7.0, 3.0], rel=1e-12)


def test_a_key_that_was_never_logged_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "llmray"):
        Plots(write_log(tmp_path, [{"loss": 1.0}]), ["losss", "elapsed_time"]).on_end({})
    [line] = caplog.messages
    assert "losss, elapsed_time, never logged" in line
    assert line.endswith("Logged were: loss")


def test_a_name_is_safe_as_a_file():
    assert file_name("../rewards/chosen") == "training____rewards_chosen.png"


def test_several_runs_are_named_by_what_tells_them_apart(tmp_path, figures):
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    places = [write_log(tmp_path / p / "run", [{"loss": 1.0}]) for p in ("one", "two")]
    places.append(write_log(tmp_path / "_third$", [{"loss": 3.0}, {"loss": 2.0}]))
    curves = read_curves([f"{place}/" for place in places[:2]], "loss")
    assert list(curves) == ["one/run", "two/run"]
    draw_runs(read_curves([str(places[2])], "loss"), "loss", tmp_path / "picture.svg")
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [r" third\$"]
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_a_directory_named_twice_is_one_curve(tmp_path):
    place = str(write_log(tmp_path / "run", [{"loss": 1.0}]))
    assert list(read_curves([place, place + "/"], "loss")) == ["run"]


def test_logs_at_a_uri_are_read(tmp_path):
    place = write_log(tmp_path / "run", [{"loss": 1.0}])
    assert read_curves([place.as_uri()], "loss") == {"run": [(1, 1.0)]}


def test_everything_that_is_missing_is_said_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    places = [write_log(tmp_path / "run", [{"loss": 1.0}]), tmp_path / "empty", tmp_path / "gone"]
    with pytest.raises(ArgumentsError) as error:
        read_curves([str(place) for place in places], "los")
    first, second, third = str(error.value).splitlines()
    assert first == f"{places[0]} logged no los. Did you mean loss? It has loss."
    assert second.startswith(f"{places[1]} has no trainer_log.jsonl.")
    assert third.startswith(f"{places[2]} does not exist")


def test_a_file_that_no_picture_can_be_is_refused(tmp_path):
    with pytest.raises(ArgumentsError, match=r"End it in \.png"):
        draw_runs({"run": [(1, 1.0)]}, "loss", tmp_path / "picture.txt")


def test_smoothing_by_hand():
    """Weight 0.5 of 7, 0, 14: (7 + 0 + 14 / 4) / 1.75 = 6, (7 / 2 + 0 + 14 / 2) / 2 = 5.25,
    (7 / 4 + 0 + 14) / 1.75 = 9."""
    assert smooth([7.0, 0.0, 14.0], weight=0.5) == [6.0, 5.25, 9.0]


def test_smoothing_does_not_lag():
    """Around the middle of a straight line the mean of both sides is the line itself."""
    line = [float(i) for i in range(401)]
    assert smooth(line)[150:250] == pytest.approx(line[150:250], rel=1e-3)
