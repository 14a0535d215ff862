"""Handles that a pool is tested with, and answers for them."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from llmray.rl.handles import Answer

QUICK = {"request_timeout_s": 0.3, "timeout_s": 0.6, "probe_every_s": 0.05, "batch_tokens": 40}


def answers(count, tokens=10):
    return [Answer(f"run-0-0-{i}", "Say it.", f"{i}", "", num_tokens=tokens) for i in range(count)]


def length(answer):
    return float(answer.response)


class Fake:
    """A handle whose answers cost time by tokens, and which can be made to fail."""

    load = 0
    busy_s = None

    def __init__(self, name="fake", seconds=0.0, score=length, fails=()):
        self.name, self.seconds, self.score = name, seconds, score
        self.batches = []
        self.fails = list(fails)  # what the next calls do: an error, "hang", or None
        self.is_dead = False
        self.is_hung = False
        self.held = []
        self.threads = ThreadPoolExecutor(1)

    def call(self, method, *args):
        if self.is_dead:
            raise OSError(f"{self.name} is dead")
        if self.is_hung:
            self.held.append(Future())
            return self.held[-1]
        if method == "ping":
            return self.threads.submit(lambda: None)
        self.batches.append(args[0])
        how = self.fails.pop(0) if self.fails else None
        if how == "hang":
            self.is_hung = True
            self.held.append(Future())
            return self.held[-1]
        return self.threads.submit(self.work, args[0], how)

    def work(self, batch, error):
        if error is not None:
            raise error
        time.sleep(self.seconds * sum(answer.num_tokens for answer in batch))
        return [self.score(answer) for answer in batch]


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def scored(of, asked, timeout=300):
    return of.submit(asked).result(timeout)
