"""Trackers: which are chosen, what is said before a run, ids over attempts, failures, limits."""

import json
import logging
import threading
import time
from pathlib import Path

import pytest

from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.arguments.tracking import TRACKERS
from llmray.errors import ArgumentsError
from llmray.train import sinks, trackers
from llmray.train.trackers import Identity, Trackers, check, choose, fingerprint, numbers

RUN = {"model_name_or_path": "m", "dataset": "a", "do_train": True, "output_dir": "out"}
KEYS = {"WANDB_API_KEY": "k" * 40, "SWANLAB_API_KEY": "k"}


def arguments(**keys: object) -> RunArguments:
    return load(RUN | keys, environ={})


@pytest.fixture(autouse=True)
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without keys that somebody left there, and no variables of trackers."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "SWANLAB_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))


# ---- the choice ------------------------------------------------------------------------------


def test_rows_are_what_the_arguments_name():
    assert tuple(sinks.SINKS) == TRACKERS


@pytest.mark.parametrize(
    ("keys", "environ", "names"),
    [
        ({"report_to": "none"}, KEYS, ()),
        ({}, KEYS, ()),
        ({"report_to": "wandb, tensorboard"}, KEYS, ("tensorboard", "wandb")),
        ({"report_to": "tensorboard", "use_swanlab": True}, KEYS, ("tensorboard", "swanlab")),
        ({"use_swanlab": True, "swanlab_mode": "disabled"}, {}, ()),
        ({"report_to": "swanlab", "swanlab_mode": "offline"}, {}, ("swanlab",)),
        ({"report_to": "swanlab", "swanlab_api_key": "k"}, {}, ("swanlab",)),
        ({"report_to": "wandb"}, {"WANDB_DISABLED": "true"}, ()),
        ({"report_to": "wandb"}, {"WANDB_MODE": "disabled"}, ()),
        ({"report_to": "wandb"}, {"WANDB_MODE": "offline"}, ("wandb",)),
        ({"report_to": "all"}, KEYS, ("tensorboard", "wandb", "swanlab")),
        ({"report_to": "all"}, {}, ("tensorboard",)),
    ],
)
def test_choice(keys, environ, names):
    choice = choose(arguments(**keys).tracking, environ)
    assert choice.names == names
    assert not choice.lacking


def test_all_says_what_it_leaves_out(caplog):
    with caplog.at_level(logging.INFO, "llmray"):
        check(arguments(report_to="all"), {"WANDB_DISABLED": "1"})
    assert caplog.messages[0] == "WANDB_DISABLED is set: no wandb."
    assert caplog.messages[1].startswith("report_to=all leaves out swanlab. swanlab has no key")


@pytest.mark.parametrize(
    ("keys", "environ", "said"),
    [
        ({"report_to": "wandb"}, {}, "Set WANDB_API_KEY, or run `wandb login`, or set WANDB_MODE="),
        ({"use_swanlab": True}, {}, "Set SWANLAB_API_KEY or swanlab_api_key, or run `swanlab logi"),
    ],
)
def test_a_service_without_key_is_refused_before_the_run(keys, environ, said):
    with pytest.raises(ArgumentsError) as error:
        check(arguments(**keys), environ)
    assert said in str(error.value)


def test_keys_that_the_libraries_keep_are_found(tmp_path):
    """`wandb login` and `swanlab login` leave them in files."""
    import wandb

    host = wandb.Settings().base_url.split("//")[1]
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {'k' * 40}\n")
    assert choose(arguments(report_to="wandb").tracking, {}).lacking == ()


@pytest.mark.parametrize(
    ("keys", "package", "line"),
    [
        ({"report_to": "wandb"}, "wandb", "pip install wandb"),
        ({"report_to": "tensorboard"}, "tensorboardX", "pip install tensorboardX"),
        (
            {"use_swanlab": True, "swanlab_mode": "local"},
            "swanboard",
            "pip install 'swanlab[dashboard]', or write swanlab_mode: offline",
        ),
    ],
)
def test_what_is_not_installed_is_refused_with_the_line_that_installs_it(
    keys, package, line, monkeypatch
):
    find = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(ArgumentsError, match="is not installed") as error:
        check(arguments(**keys), KEYS)
    assert str(error.value).endswith(line)


def test_uploads_that_are_not_made_are_said(caplog):
    with caplog.at_level(logging.WARNING, "llmray"):
        check(arguments(report_to="wandb"), {**KEYS, "WANDB_LOG_MODEL": "checkpoint"})
        check(arguments(report_to="wandb"), {**KEYS, "WANDB_WATCH": "false"})
    assert caplog.messages == ["WANDB_LOG_MODEL=checkpoint does nothing: metrics alone are sent"]


# ---- ids -------------------------------------------------------------------------------------


def test_a_run_that_goes_on_keeps_its_id(tmp_path):
    first = Identity(tmp_path, 1)
    first.begin(0)
    killed_before_a_checkpoint = Identity(tmp_path, 1)
    killed_before_a_checkpoint.begin(0)
    killed_after_one = Identity(tmp_path, 1)
    killed_after_one.begin(4)
    killed_after_one.end()
    trained_further_with_other_keys = Identity(tmp_path, 2)
    trained_further_with_other_keys.begin(8)
    attempts = [killed_before_a_checkpoint, killed_after_one, trained_further_with_other_keys]
    assert {(a.run_id, a.began) for a in attempts} == {(first.run_id, first.began)}


def test_a_new_run_in_the_same_directory_gets_a_new_id(tmp_path):
    first = Identity(tmp_path, 1)
    first.begin(0)
    with_other_keys = Identity(tmp_path, 2)
    with_other_keys.begin(0)
    with_other_keys.end()
    after_the_end = Identity(tmp_path, 2)
    after_the_end.begin(0)
    assert len({i.run_id for i in (first, with_other_keys, after_the_end)}) == 3


def test_how_a_run_is_started_is_no_part_of_what_it_is():
    flat = arguments().flat()
    assert fingerprint(flat) == fingerprint(flat | {"resume_from_checkpoint": True})
    assert fingerprint(flat) != fingerprint(flat | {"learning_rate": 1.0})


# ---- failures --------------------------------------------------------------------------------


class Recorder:
    """A sink that keeps what it is given; `broken` breaks at that step, `slow` holds it up."""

    def __init__(self, broken: int | None = None, slow: threading.Event | None = None):
        self.where, self.given, self.ended = "here", [], None
        self.broken, self.slow = broken, slow

    def log(self, values, step):
        if self.slow is not None:
            self.slow.wait(300)
        if step == self.broken:
            raise ConnectionError("no route\nto host")
        self.given.append((step, values))

    def finish(self, *, succeeded):
        self.ended = succeeded


@pytest.fixture
def install(monkeypatch):
    """Puts a sink, or a function that opens one, in the place of TensorBoard."""

    def put(sink):
        opened = sink if callable(sink) else lambda session: sink
        monkeypatch.setattr(sinks.TensorBoard, "open", staticmethod(opened))

    return put


def tracked(tmp_path: Path, steps: int = 3) -> Trackers:
    observer = Trackers(arguments(report_to="tensorboard"), tmp_path, {})
    observer.on_start(0, steps)
    for step in range(1, steps + 1):
        observer.on_log({"current_steps": step, "total_steps": steps, "loss": 1 / step, "t": "0:1"})
    return observer


def test_numbers_go_in_order_and_the_figures_of_the_run_last(tmp_path, install):
    sink = Recorder()
    install(sink)
    tracked(tmp_path).on_end({"epoch": 1.0, "train_loss": 0.5, "eval_loss": 2.0})
    expected = [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    assert sink.given == [*expected, (3, {"train_loss": 0.5})]
    assert sink.ended is True


def test_a_failure_is_said_once_and_ends_nothing(tmp_path, install, caplog):
    sink = Recorder(broken=2)
    install(sink)
    with caplog.at_level(logging.WARNING, "llmray"):
        tracked(tmp_path, steps=5).on_end({})
    [line] = caplog.messages
    assert line.startswith("tensorboard failed, the run goes on without it")
    assert line.endswith("(ConnectionError: no route to host)")
    assert sink.given == [(1, {"loss": 1.0})]


def test_one_that_cannot_be_opened_is_said_once(tmp_path, install, caplog):
    def refuse(session):
        raise SystemExit("wrong key")  # some libraries do

    install(refuse)
    with caplog.at_level(logging.WARNING, "llmray"):
        tracked(tmp_path).on_end({})
    assert [line for line in caplog.messages if "(SystemExit: wrong key)" in line]
    assert len(caplog.messages) == 1


def test_one_that_hangs_holds_up_no_step_and_the_end_for_a_limited_time(
    tmp_path, install, caplog, monkeypatch
):
    monkeypatch.setattr(trackers, "END_TIMEOUT_S", 0.2)
    release = threading.Event()
    install(Recorder(slow=release))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "llmray"):
        tracked(tmp_path).on_end({})
    assert time.monotonic() - began < 60  # it hangs for five minutes
    release.set()
    assert caplog.messages[0].startswith("tensorboard did not end in time")


def test_a_run_that_ends_by_an_error_is_marked_as_failed(tmp_path, install, monkeypatch):
    """What the interpreter calls at exit; a run that ended well has taken it back."""
    at_exit = []
    monkeypatch.setattr(trackers.atexit, "register", at_exit.append)
    monkeypatch.setattr(trackers.atexit, "unregister", at_exit.remove)
    failed, done = Recorder(), Recorder()
    install(done)
    tracked(tmp_path).on_end({})
    assert at_exit == []
    install(failed)
    tracked(tmp_path)
    at_exit[0]()
    assert (failed.ended, done.ended) == (False, True)
    assert json.loads((tmp_path / "trackers.json").read_text())["ended"] is False


def test_numbers_of_a_record():
    record = {"current_steps": 3, "total_steps": 9, "loss": 1.5, "elapsed_time": "0:01", "x": True}
    assert numbers(record) == {"loss": 1.5}


# ---- sweeps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_trials_have_one_group_and_ids_of_their_own(name, tmp_path, monkeypatch):
    asked = []

    def init(**named):
        asked.append(named)
        raise ConnectionError("not in this test")

    monkeypatch.setattr(f"{name}.init", init)
    environ = {"WANDB_MODE": "offline", "WANDB_RUN_ID": "one", "WANDB_NAME": "one"}
    keys = {"report_to": name, "swanlab_mode": "offline"}
    for number in (1, 2):
        run = arguments(**keys, run_name=f"sweep/trial_{number}")
        trackers_of = Trackers(run, tmp_path / str(number), environ, "sweep")
        trackers_of.on_start(0, 1)
        trackers_of.on_end({})
    first, second = asked
    assert first["group"] == second["group"] == "sweep"
    assert [first["name"], second["name"]] == ["sweep/trial_1", "sweep/trial_2"]
    assert first["id"] != second["id"]
