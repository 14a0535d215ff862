"""Trackers as one observer: which are asked for, under which id, and what happens when one fails.

Each tracker is served by a thread of its own, so that no step waits for a network; what fails there
is said once, and the run goes on without it. How a tracker is opened and written stands in `sinks`.
"""

from __future__ import annotations

import atexit
import json
import queue
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmray import store
from llmray.arguments import environment
from llmray.arguments.tracking import TRACKERS
from llmray.errors import ArgumentsError
from llmray.train import sinks
from llmray.train.observers import LOG_NAME, Observer, Record, read_log

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments
    from llmray.arguments.tracking import TrackingArguments

log = getLogger("llmray")

IDENTITY_NAME = "trackers.json"
# how long a run waits, at its end, for what its trackers have not yet sent
END_TIMEOUT_S = 60.0
# the same where it ends by an error
ABORT_TIMEOUT_S = 10.0
# these say how a run is started, not what it is
_NOT_IDENTITY = ("resume_from_checkpoint", "overwrite_output_dir")


@dataclass(frozen=True)
class Choice:
    """The trackers that a run uses, why others are left out, and what those it uses lack."""

    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


def choose(tracking: TrackingArguments, environ: Mapping[str, str]) -> Choice:
    """The trackers of `report_to` and `use_swanlab`; `all` are those that can be used here."""
    named = {*tracking.report_to, *(["swanlab"] if tracking.use_swanlab else [])}
    names, left_out, lacking = [], [], []
    for name in TRACKERS:
        if name not in named and "all" not in named:
            continue
        off = _switched_off(name, tracking, environ)
        lacks = None if off else _lacks(name, tracking, environ)
        if off:
            left_out.append(off)
        elif lacks and name not in named:
            left_out.append(f"report_to=all leaves out {name}. {lacks}")
        else:
            names.append(name)
            lacking += [lacks] if lacks else []
    return Choice(tuple(names), tuple(left_out), tuple(lacking))


def check(arguments: RunArguments, environ: Mapping[str, str]) -> None:
    """Say before a run starts which trackers are left out.

    Raises:
        ArgumentsError: one that is named is not installed, or has no key for its service.
    """
    choice = choose(arguments.tracking, environ)
    if choice.lacking:
        raise ArgumentsError("\n".join(choice.lacking))
    for line in choice.left_out:
        log.info("%s", line)
    if "wandb" in choice.names:
        for name in ("WANDB_WATCH", "WANDB_LOG_MODEL"):
            if environ.get(name, "").lower() not in ("", *environment.FALSE):
                log.warning("%s=%s does nothing: metrics alone are sent", name, environ[name])


def _switched_off(name: str, tracking: TrackingArguments, environ: Mapping[str, str]) -> str | None:
    if name == "wandb" and environment.flag(environ, "WANDB_DISABLED"):
        return "WANDB_DISABLED is set: no wandb."
    if name == "wandb" and environ.get("WANDB_MODE") == "disabled":
        return "WANDB_MODE=disabled: no wandb."
    if name == "swanlab" and tracking.swanlab_mode == "disabled":
        return "swanlab_mode=disabled: no swanlab."
    return None


def _lacks(name: str, tracking: TrackingArguments, environ: Mapping[str, str]) -> str | None:
    sink = sinks.SINKS[name]
    for package, install in sink.packages(tracking).items():
        if find_spec(package) is None:
            return f"{name} needs the package {package}, which is not installed: {install}"
    return sink.missing_key(tracking, environ)


class Trackers(Observer):
    """The chosen trackers of a run; all get the numbers of trainer_log.jsonl, by its keys.

    Args:
        arguments: of the run.
        directory: of the run's files.
        environ: the environment.
        group: what the runs of a sweep are called together; none for a run alone.
    """

    def __init__(
        self,
        arguments: RunArguments,
        directory: Path,
        environ: Mapping[str, str],
        group: str | None = None,
    ) -> None:
        self.arguments = arguments
        self.group = group
        self.directory = directory
        self.environ = environ
        self.identity = Identity(directory, fingerprint(arguments.flat()))
        self._channels: list[_Channel] = []
        self._step = 0

    def on_start(self, step: int, total_steps: int) -> None:
        """Open the trackers in the background, under the id of the run that is resumed."""
        self._step = step
        self.identity.begin(step)
        session = sinks.Session(
            run_id=self.identity.run_id,
            began=self.identity.began,
            step=step,
            name=self.arguments.tracking.run_name or str(self.arguments.training.output_dir),
            directory=self.directory,
            config={k: v for k, v in self.arguments.flat().items() if v is not None},
            history=[
                (record["current_steps"], numbers(record))
                for record in read_log(self.directory / LOG_NAME)
                if record["current_steps"] <= step
            ],
            tracking=self.arguments.tracking,
            environ=self.environ,
            group=self.group,
        )
        for name in choose(self.arguments.tracking, self.environ).names:
            self._channels.append(_Channel(name, partial(sinks.SINKS[name].open, session)))
        atexit.register(self._abort)

    def on_log(self, record: Record) -> None:
        """Hand the numbers to the trackers' threads."""
        self._step = record["current_steps"]
        values, step = numbers(record), self._step
        for channel in self._channels:
            channel.put(lambda sink: sink.log(values, step))

    def on_end(self, metrics: Record) -> None:
        """Send the run's figures, and wait for the trackers up to a time limit."""
        atexit.unregister(self._abort)
        figures = {key: value for key, value in numbers(metrics).items() if key != "epoch"}
        figures = {key: value for key, value in figures.items() if not key.startswith("eval_")}
        for channel in self._channels:
            channel.put(lambda sink: sink.log(figures, self._step))
            channel.put(lambda sink: sink.finish(succeeded=True), last=True)
        self._wait(END_TIMEOUT_S)
        self.identity.end()

    def _abort(self) -> None:
        """The process ends without `on_end`: mark the run as failed, if that is quickly done."""
        for channel in self._channels:
            channel.is_silent = True  # what failed is said already; this is not worth a line
            channel.put(lambda sink: sink.finish(succeeded=False), last=True)
        self._wait(ABORT_TIMEOUT_S)

    def _wait(self, timeout_s: float) -> None:
        """Wait for all trackers together."""
        end = time.monotonic() + timeout_s
        for channel in self._channels:
            channel.wait(max(0.0, end - time.monotonic()))


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, by its keys; its step and their count are no metrics."""
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if key not in ("current_steps", "total_steps")
    }


def fingerprint(flat: Mapping[str, Any]) -> int:
    """A number that differs where the arguments of two runs do."""
    told = {key: value for key, value in flat.items() if key not in _NOT_IDENTITY}
    return zlib.crc32(json.dumps(told, sort_keys=True, default=str).encode())


class Identity:
    """The run's id in its trackers, kept in trackers.json of the run directory.

    A run that goes on from a checkpoint, or that begins again because it was killed before the
    first one, keeps its id. A new run in the same directory gets a new one.
    """

    def __init__(self, directory: Path, arguments: int) -> None:
        self.path = directory / IDENTITY_NAME
        self.arguments = arguments
        self.run_id = uuid.uuid4().hex[:8]
        self.began = f"{datetime.now():%Y%m%d-%H%M%S}"

    def begin(self, step: int) -> None:
        """Take the id that the run has, or give it one."""
        known = json.loads(self.path.read_text()) if self.path.is_file() else None
        is_same = known is not None and not known["ended"] and known["arguments"] == self.arguments
        if known is not None and (step > 0 or is_same):
            self.run_id, self.began = known["run_id"], known["began"]
        self._write(ended=False)

    def end(self) -> None:
        """Note that what begins at step 0 from now on is another run."""
        self._write(ended=True)

    def _write(self, *, ended: bool) -> None:
        content = {
            "run_id": self.run_id,
            "began": self.began,
            "arguments": self.arguments,
            "ended": ended,
        }
        store.write_atomic(self.path, json.dumps(content) + "\n")


class _Channel:
    """The thread of one tracker: opens it, does what is put, says the first failure, then rests."""

    def __init__(self, name: str, open_sink: Callable[[], sinks.Sink]) -> None:
        self.name = name
        self.is_silent = False
        self._open = open_sink
        self._queue: queue.SimpleQueue[tuple[Callable[[sinks.Sink], None], bool]] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=f"llmray-{name}", daemon=True)
        self._thread.start()

    def put(self, action: Callable[[sinks.Sink], None], *, last: bool = False) -> None:
        """Do this after what was put before."""
        self._queue.put((action, last))

    def wait(self, timeout_s: float) -> None:
        """Wait until the last action is done, no longer than the limit."""
        self._thread.join(timeout_s)
        if self._thread.is_alive() and not self.is_silent:
            log.warning(
                "%s did not end in time: what it has not sent is in %s alone",
                self.name,
                LOG_NAME,
            )

    def _run(self) -> None:
        try:
            sink = self._open()
            log.info("%s: %s", self.name, sink.where)
            is_last = False
            while not is_last:
                action, is_last = self._queue.get()
                action(sink)
        except BaseException as error:  # a tracker never ends a run, whatever it raises
            if self.is_silent:
                return
            text = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning(
                "%s failed, the run goes on without it; %s has all metrics (%s)",
                self.name,
                LOG_NAME,
                text[:500],
            )
