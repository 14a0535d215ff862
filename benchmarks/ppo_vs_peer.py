"""PPO with LoRA beside LLaMA-Factory, one run file for all, alternating in one session.

    python benchmarks/ppo_vs_peer.py --peer-python PEER/ppo/bin/python

The model, a reward model of its size and the prompts are made on the spot; every response is as
long as it may be, so both programs compute the same number of tokens. LLaMA-Factory as published
(gradient checkpointing on, forward passes under autocast), ours, and LLaMA-Factory with our
settings: nothing recomputed, float32. `peer_ppo_setup.sh` makes the peer's environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ppo_model import make_model, make_prompts
from report import Report, gflops
from trainings import Measured, measure_steps

PEER_PROBE = Path(__file__).with_name("peer_ppo_probe.py")
OUR_PROBE = Path(__file__).with_name("ppo_probe.py")
PUBLISHED, OURS, EQUAL = "LLaMA-Factory, published settings", "llmray", "LLaMA-Factory, equal"
GOAL = 2.0
WARM_UP = 2
PARTS = ("rollout", "scores", "logprobs", "waiting", "update")  # of a step; programs differ


def run_file(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run that both programs get; every key is one of LLaMA-Factory's."""
    return {
        "model_name_or_path": str(scratch / "policy"),
        "reward_model": str(scratch / "reward"),
        "reward_model_type": "full",
        "template": "chatml",
        "stage": "ppo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": "prompts",
        "dataset_dir": str(scratch / "data"),
        "cutoff_len": 128,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation,
        "ppo_buffer_size": options.buffer,
        "ppo_epochs": options.epochs,
        "max_new_tokens": options.new_tokens,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": 1.0e-5,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 10_000,
        "seed": 42,
        "report_to": "none",
    }


def main() -> None:
    """Measure, compare, publish."""
    options = parse()
    measured: dict[str, list[Measured]] = {PUBLISHED: [], OURS: [], EQUAL: []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "policy", 1)
        make_model(scratch / "reward", 2, scores=True)
        make_prompts(scratch / "data", 512)
        run = run_file(scratch, options)
        plain = {**run, "disable_gradient_checkpointing": True}
        for round_ in range(options.rounds):
            home = scratch / str(round_)
            measured[PUBLISHED].append(peer(run, home / "published", options))
            own = {**plain, "fp32": True}
            words = [sys.executable, str(OUR_PROBE)]
            measured[OURS].append(measure_steps(words, own, home / "ours", options.threads))
            measured[EQUAL].append(peer(plain, home / "equal", options, whole=True))
    compare(measured, options).publish(options.json)


def peer(
    run: dict[str, Any], directory: Path, options: argparse.Namespace, *, whole: bool = False
) -> Measured:
    """Train `run` with LLaMA-Factory, in `whole` float32 or as it does by itself."""
    environ = {
        "DISABLE_VERSION_CHECK": "1",
        "USE_RAY": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hf"),
        "LLMRAY_PROBE_FP32": "1" if whole else "",
    }
    words = [options.peer_python, str(PEER_PROBE)]
    return measure_steps(words, run, directory, options.threads, environ)


def seconds(one: Measured) -> list[float]:
    """Of each step after the first ones."""
    return [step["seconds"] for step in one.steps[WARM_UP:]]


def compare(measured: dict[str, list[Measured]], options: argparse.Namespace) -> Report:
    """The table: medians over steps, then over rounds."""
    per_step = options.batch * options.accumulation * options.buffer
    title = (
        f"PPO, 2.9 M parameters, LoRA 8, {options.batch} x {options.accumulation} x "
        f"{options.buffer} responses of {options.new_tokens} tokens a step, {options.epochs} "
        f"epochs, fp32, {options.threads} threads"
    )
    columns = ["run", "seconds a step", "rounds", "llmray is", "peak MiB", "mean reward"]
    report = Report(title, columns)
    middle = {
        name: [statistics.median(seconds(o)) for o in runs] for name, runs in measured.items()
    }
    for name, runs in measured.items():
        pairs = zip(middle[name], middle[OURS], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        report.rows.append(
            [
                name,
                f"{statistics.median(middle[name]):.3f}",
                ", ".join(f"{one:.3f}" for one in middle[name]),
                "" if name == OURS else f"{ratio:.2f} times",
                f"{statistics.median(one.peak_mib for one in runs):.0f}",
                f"{statistics.median(step['reward'] for step in runs[0].steps):.3f}",
            ]
        )
        report.details[name] = [vars(one) for one in runs]
        if name != OURS and ratio < GOAL:
            report.failures.append(f"{name}: {ratio:.2f} times, {GOAL} was to be reached")
        if {tokens for one in runs for tokens in one.step_tokens} != {
            per_step * options.new_tokens
        }:
            report.failures.append(f"{name}: responses were not of the same length")
    report.facts = [
        f"The peer's environment: {peer_versions(options.peer_python)}.",
        f"Medians over the steps after the first {WARM_UP} of {options.steps}, then over "
        f"{options.rounds} alternating rounds; {gflops(options.threads):.0f} GFLOP/s in fp32 "
        "products.",
        *(f"{name}: {shares(runs)}." for name, runs in measured.items()),
    ]
    return report


def shares(runs: list[Measured]) -> str:
    """Seconds of the parts of a step, medians of all."""
    steps = [step for one in runs for step in one.steps[WARM_UP:]]
    names = [name for name in PARTS if name in steps[0]]
    middle = {name: statistics.median(step[name] for step in steps) for name in names}
    return ", ".join(f"{name} {value:.3f} s" for name, value in middle.items())


def peer_versions(python: str) -> str:
    """The versions in the peer's environment that decide its figures."""
    code = (
        "from importlib.metadata import version as v\n"
        "names = 'llamafactory', 'trl', 'torch', 'transformers', 'peft'\n"
        "print(', '.join(f'{n} {v(n)}' for n in names))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def parse() -> argparse.Namespace:
    """The command line; the path may come from the environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("LLMRAY_BENCH_PEER_PPO_PYTHON")
    parser.add_argument("--peer-python", default=default, required=default is None)
    add_sizes(parser, rounds=3)
    return parser.parse_args()


def add_sizes(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options of every benchmark of stage ppo; `rounds` is how often by default."""
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--buffer", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here")


if __name__ == "__main__":
    main()
