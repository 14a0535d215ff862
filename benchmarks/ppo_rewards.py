"""What rewards cost stage ppo: a reward that waits, a server that is slow, many handles, Ray.

    python benchmarks/ppo_rewards.py [--parts sleep,api,handles,actors,ray]

sleep: a reward that waits as long as policy and reference take to read the responses, of which
0.8 is to be hidden behind them. api: a server with a latency of 100 ms, which is to cost a tenth
of the step at most. handles: R handles that wait, behind the dispatcher of the run, which are to
score 0.85 R times what one does; actors: the same as actors of Ray on this machine. ray: the whole
loop in one worker of Ray beside no Ray, 0.95 of its speed at least. The model is that of
`ppo_vs_peer.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ppo_model import make_model, make_prompts
from ppo_vs_peer import OUR_PROBE, WARM_UP, add_sizes, run_file
from report import Report
from trainings import Measured, measure_steps, ours

from llmray.rl.handles import Answer, Handle, InProcess
from llmray.rl.pool import Pool, PoolOptions

LEAST_HIDDEN, MOST_API_SHARE, LEAST_OF_HANDLES, LEAST_OF_NO_RAY = 0.8, 0.1, 0.85, 0.95
LATENCY_S = 0.1
HANDLES = (1, 2, 4, 8, 16, 32, 64)
ACTORS = (1, 2, 4)
ANSWERS_A_HANDLE = 64
SECONDS_A_TOKEN = 1e-4  # that a handle waits; an answer has about 100 tokens

FUNCTIONS = """
import os, time

PER_ANSWER = float(os.environ.get("BENCH_SECONDS_AN_ANSWER", 0))

def score(prompts, responses):
    time.sleep(PER_ANSWER * len(responses))
    return [float(len(response) % 7) for response in responses]
"""

SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        time.sleep(float(sys.argv[1]))
        body = json.dumps({"scores": [float(len(text) % 7) for text in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def main() -> None:
    """Measure the parts that are asked for, publish each."""
    options = parse()
    report = Report(
        f"Rewards of stage ppo, {options.threads} threads", ["what", "figure", "goal", "details"]
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "policy", 1)
        make_model(scratch / "reward", 2, scores=True)
        make_prompts(scratch / "data", 512)
        (scratch / "bench_rewards.py").write_text(FUNCTIONS)
        parts = options.parts.split(",")
        if "handles" in parts:
            of_handles(report)
        if "actors" in parts:
            of_actors(report)
        if "sleep" in parts or "api" in parts:
            of_waiting(report, scratch, options, parts)
        if "ray" in parts:
            of_ray(report, scratch, options)
    report.publish(options.json)


def note(report: Report, what: str, figure: float, goal: str, is_met: bool, details: str) -> None:
    """Add a row, and a failure where the goal is missed."""
    report.rows.append([what, f"{figure:.3f}", goal, details])
    if not is_met:
        report.failures.append(f"{what}: {figure:.3f}, the goal is {goal}")


def of_waiting(
    report: Report, scratch: Path, options: argparse.Namespace, parts: Sequence[str]
) -> None:
    """Steps with a reward at once, with one that sleeps, and with a server; in turns."""
    at_once: list[Measured] = []
    sleeping: list[Measured] = []
    by_server: list[Measured] = []
    slept: list[float] = []
    for round_ in range(options.rounds):
        home = scratch / f"waiting-{round_}"
        at_once.append(train(scratch, home / "none", options, "bench_rewards:score"))
        slept.append(statistics.median(of(at_once[-1:], "logprobs")))
        if "sleep" in parts:
            wish = {"BENCH_SECONDS_AN_ANSWER": str(slept[-1] / num_answers(options))}
            words = "bench_rewards:score"
            sleeping.append(train(scratch, home / "sleep", options, words, wish))
        if "api" in parts:
            with server() as address:
                by_server.append(train(scratch, home / "api", options, address))
    bare = statistics.median(of(at_once, "seconds"))
    report.details["at once"] = [vars(one) for one in at_once]
    if sleeping:
        sleep = statistics.median(slept)
        hidden = 1 - statistics.median(of(sleeping, "waiting")) / sleep
        told = f"{sleep:.3f} s slept a step; steps of {bare:.3f} s without"
        told += f", {statistics.median(of(sleeping, 'seconds')):.3f} s with"
        goal = f"at least {LEAST_HIDDEN}"
        note(report, "share hidden of a sleep", hidden, goal, hidden >= LEAST_HIDDEN, told)
        report.details["sleeping"] = [vars(one) for one in sleeping]
    if by_server:
        step = statistics.median(of(by_server, "seconds"))
        told = f"steps of {bare:.3f} s without, {step:.3f} s with; "
        told += f"{statistics.median(of(by_server, 'waiting')):.3f} s waited"
        share = step / bare - 1
        goal = f"at most {MOST_API_SHARE}"
        note(report, "cost of a slow server", share, goal, share <= MOST_API_SHARE, told)
        report.details["by server"] = [vars(one) for one in by_server]


def num_answers(options: argparse.Namespace) -> int:
    """Responses of a step."""
    return int(options.batch * options.accumulation * options.buffer)


def of(runs: Sequence[Measured], name: str) -> list[float]:
    """A figure of each step after the first ones."""
    return [step[name] for one in runs for step in one.steps[WARM_UP:]]


def train(
    scratch: Path,
    home: Path,
    options: argparse.Namespace,
    reward: str,
    environ: dict[str, str] | None = None,
) -> Measured:
    """Some steps with a reward, under the stopwatch."""
    given = {**settings(scratch, options), "reward_model": reward}
    given.pop("reward_model_type")
    found = {"PYTHONPATH": f"{scratch}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, str(OUR_PROBE)]
    return measure_steps(words, given, home, options.threads, {**found, **(environ or {})})


def settings(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run file of `ppo_vs_peer.py`, with our settings."""
    return {
        **run_file(scratch, options),
        "disable_gradient_checkpointing": True,
        "fp32": True,
    }


@contextmanager
def server() -> Iterator[str]:
    """The address of a server of rewards in a process of its own."""
    words = [sys.executable, "-c", SERVER, str(LATENCY_S)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/score"
    finally:
        process.terminate()
        process.wait(30)


class Waits:
    """Scores after as long as its tokens would take on a machine of its own."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Sleeps."""
        time.sleep(SECONDS_A_TOKEN * sum(answer.num_tokens for answer in answers))
        return [0.0] * len(answers)


def of_handles(report: Report) -> None:
    """Answers a second by R handles that wait, as many answers for each."""
    rates = {}
    for number in HANDLES:
        handles = [InProcess(f"waits-{i}", Waits()) for i in range(number)]
        rates[number] = rate_of(handles)
        for handle in handles:
            handle.close()
    compare(report, "waiting handles", rates)


def of_actors(report: Report) -> None:
    """The same by actors of Ray, each in a process of its own."""
    import ray

    from llmray.orchestration.reward_actor import ActorReward, Pong, Scored, Seat
    from llmray.rl.merging import Merging

    class Actor:
        """What a reward model's actor is, with a model that waits."""

        def __init__(self) -> None:
            self._merging = Merging(Waits(), PoolOptions().batch_tokens)

        async def score(self, answers: Sequence[Answer], caller: str) -> Scored:
            asked = self._merging.submit(answers, caller)
            return Scored(await asyncio.wrap_future(asked), os.getpid())

        async def ping(self) -> Pong:
            return Pong("", "", os.getpid())

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    rates = {}
    for number in ACTORS:
        kind = ray.remote(num_cpus=0)(Actor)
        seats = [Seat("waits", i, kind.remote(), {}, Pong("", "", 0)) for i in range(number)]
        ray.get([seat.actor.ping.remote() for seat in seats])
        rates[number] = rate_of([ActorReward(seat, None) for seat in seats])
        for seat in seats:
            ray.kill(seat.actor)
    ray.shutdown()
    compare(report, "waiting actors", rates)


def compare(report: Report, what: str, rates: dict[int, float]) -> None:
    """A row for each number of handles."""
    goal = f"at least {LEAST_OF_HANDLES}"
    for number, rate in rates.items():
        share = rate / (number * rates[1])
        told = f"{rate:.0f} answers/s"
        title = f"{number} {what}, of {number} times one"
        note(report, title, share, goal, share >= LEAST_OF_HANDLES, told)


def rate_of(handles: Sequence[Handle]) -> float:
    """Answers a second through the dispatcher, the median of three times."""
    number = len(handles)
    draw = np.random.default_rng(number)
    lengths = draw.integers(50, 151, number * ANSWERS_A_HANDLE).tolist()
    answers = [Answer(str(i), "p", "r", "pr", num_tokens=n) for i, n in enumerate(lengths)]
    pool = Pool(handles, PoolOptions())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        # a rank submits what it has sampled side by side
        asked = [pool.submit(answers[at : at + 16]) for at in range(0, len(answers), 16)]
        for future in asked:
            future.result()
        seconds.append(time.perf_counter() - started)
    pool.close()
    return len(answers) / statistics.median(seconds)


def of_ray(report: Report, scratch: Path, options: argparse.Namespace) -> None:
    """Steps in one worker of Ray beside steps without, in turns; the rates of the same steps."""
    run = settings(scratch, options)
    ratios: list[float] = []
    for round_ in range(options.rounds):
        home = scratch / f"ray-{round_}"
        ray = {"use_ray": True, "ray_num_workers": 1, "ray_storage_path": str(home / "storage")}
        # as many threads as the process without Ray has
        cores = {"CPU": options.threads}
        ray |= {"resources_per_worker": cores, "reward_resources_per_actor": cores}
        bare = ours({**run, "use_ray": False}, home / "bare", options.threads)
        inside = ours({**run, **ray}, home / "inside", options.threads)
        pairs = zip(inside.step_rates[WARM_UP:], bare.step_rates[WARM_UP:], strict=True)
        ratios += [one / other for one, other in pairs]
        report.details[f"ray {round_}"] = [vars(bare), vars(inside)]
    ratio = statistics.median(ratios)
    goal = f"at least {LEAST_OF_NO_RAY}"
    told = "tokens/s of the same steps"
    note(report, "one worker of Ray, of no Ray", ratio, goal, ratio >= LEAST_OF_NO_RAY, told)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="sleep,api,handles,actors,ray")
    add_sizes(parser, rounds=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
