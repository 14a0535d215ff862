"""How soon the command line answers, against `import torch`, and how soon a second run trains.

    python benchmarks/startup.py [--model SMOLLM2]

`--help` and a misspelt key must take less than half of `import torch`. With a model folder, the
demonstration data is trained on twice: the second run finds its tokens prepared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Report
from trainings import ours

DATA = Path(__file__).parents[1] / "data"
LIMIT = 0.5

COMMANDS = {
    "import torch": (["-c", "import torch"], 0),
    "llmray --help": (["-m", "llmray", "--help"], 0),
    "llmray check, a good run file": (["-m", "llmray", "check", "RUN"], 0),
    "llmray check, a misspelt key": (["-m", "llmray", "check", "RUN", "learning_rte=1"], 2),
    "llmray train, a misspelt key": (["-m", "llmray", "train", "RUN", "learning_rte=1"], 2),
}


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default=os.environ.get("LLMRAY_BENCH_MODEL"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    report = Report("Time to an answer", ["command", "seconds", "of import torch"])
    answers(report, options.rounds)
    if options.model:
        first_steps(report, options.model)
    else:
        report.facts.append("Time to the first update: not measured, --model was not given.")
    report.publish(options.json)


def answers(report: Report, rounds: int) -> None:
    """Medians over rounds in which the commands take turns; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "run.yaml")
        file.write_text(
            "model_name_or_path: m\nstage: sft\ndo_train: true\ndataset: demo_persona\n"
            f"dataset_dir: {DATA}\noutput_dir: {scratch}/out\n"
        )
        for _ in range(rounds + 1):
            for name, (words, code) in COMMANDS.items():
                command = [sys.executable, *(str(file) if w == "RUN" else w for w in words)]
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, check=False)
                seconds[name].append(time.perf_counter() - started)
                assert done.returncode == code, done.stderr.decode()
    base = statistics.median(seconds["import torch"][1:])
    for name, taken in seconds.items():
        middle = statistics.median(taken[1:])
        report.rows.append([name, f"{middle:.2f}", f"{middle / base:.0%}"])
        report.details[name] = taken[1:]
        if name != "import torch" and middle >= LIMIT * base:
            report.failures.append(f"{name} takes {middle / base:.0%} of import torch")


def first_steps(report: Report, model: str) -> None:
    """Two runs of one update each from the same file: the second has nothing to prepare."""
    run = {
        "model_name_or_path": model,
        "template": "smollm2",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "demo_persona",
        "dataset_dir": str(DATA),
        "cutoff_len": 256,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    with tempfile.TemporaryDirectory() as scratch:
        # a cache of its own, so that the first run is a first one
        os.environ["LLMRAY_CACHE"] = str(Path(scratch, "cache"))
        for name in ("first", "second"):
            started = time.time()
            measured = ours(run, Path(scratch, name), os.cpu_count() or 1)
            logged = Path(scratch, name, "out", "trainer_log.jsonl").stat().st_mtime - started
            report.rows.append(
                [
                    f"{name} run, until its first update begins",
                    f"{logged - measured.seconds:.2f}",
                    "",
                ]
            )
            report.details[f"{name} run"] = vars(measured)


if __name__ == "__main__":
    main()
