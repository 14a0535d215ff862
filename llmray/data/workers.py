"""Processes that build shards for this one: each takes the number of a shard, gives its report.

    with workers.Processes(4, early=2) as processes:      # two import while the plan is made
        reports = processes.build(plan)

They are started afresh (this process may have threads of torch and of the tokenizer), run nothing
of the program's main module, and end when this process is gone, with the shard at hand done.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Self

from llmray.data.build import ShardReport, build_shard
from llmray.data.planning import Plan
from llmray.errors import DataError, LlmrayError

COMMAND = "from llmray.data import workers; workers.serve()"


class Processes:
    """Processes to be had for building shards; all end with the block."""

    def __init__(self, num_workers: int, early: int = 0) -> None:
        """Start `early` of `num_workers` processes; others start when there is work for them."""
        self._started: list[subprocess.Popen[bytes]] = []
        self._idle = [self._start() for _ in range(min(early, num_workers))]
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="shards")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._started:
            worker.terminate()  # nobody takes what it is at; what is finished stays
        self._pool.shutdown()
        for worker in self._started:
            worker.terminate()  # one that a thread was just starting
            worker.communicate()

    def build(self, plan: Plan) -> Iterator[ShardReport]:
        """The reports of all shards of a plan in order.

        Raises:
            LlmrayError: what a process raised.
            DataError: a process died.
        """
        plan_bytes = pickle.dumps(plan)
        own = threading.local()

        def build_one(index: int) -> ShardReport:
            if not hasattr(own, "worker"):
                own.worker = self._take()
                _send(own.worker, plan_bytes)
            return _ask(own.worker, index)

        return self._pool.map(build_one, range(len(plan.shards)))

    def _take(self) -> subprocess.Popen[bytes]:
        try:
            return self._idle.pop()
        except IndexError:
            return self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._started.append(_start())
        return self._started[-1]


def serve() -> None:
    """Build shards by number until there are no more; the work of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal is for the parent
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the reports
    try:
        plan: Plan = pickle.load(source)
    except EOFError:
        return  # there was nothing to do
    while (index := _next(source)) is not None:
        answer: ShardReport | LlmrayError
        try:
            answer = build_shard(plan, index)
        except LlmrayError as error:
            answer = error
        try:
            pickle.dump(answer, target)
            target.flush()
        except BrokenPipeError:
            return


def _next(source: BinaryIO) -> int | None:
    try:
        return int(pickle.load(source))
    except EOFError:
        return None


def _start() -> subprocess.Popen[bytes]:
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
    }
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
    )


def _ask(worker: subprocess.Popen[bytes], index: int) -> ShardReport:
    _send(worker, pickle.dumps(index))
    assert worker.stdout is not None
    try:
        answer = pickle.load(worker.stdout)
    except EOFError:
        raise _died(worker) from None
    if isinstance(answer, LlmrayError):
        raise answer
    assert isinstance(answer, ShardReport)
    return answer


def _send(worker: subprocess.Popen[bytes], content: bytes) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(content)
        worker.stdin.flush()
    except BrokenPipeError:
        raise _died(worker) from None


def _died(worker: subprocess.Popen[bytes]) -> DataError:
    return DataError(
        f"A process that prepared data ended with code {worker.wait()}; killed, most likely for "
        "lack of memory, if that is -9. Lower preprocessing_num_workers; finished shards are kept."
    )
