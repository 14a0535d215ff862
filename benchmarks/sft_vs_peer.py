"""SFT with LoRA beside LLaMA-Factory, one run file for both, alternating in one session.

    python benchmarks/sft_vs_peer.py --peer-python PEER/venv/bin/python --model SMOLLM2 --data DATA

Three rows: the peer with its published settings (gradient checkpointing on), ours, and the peer
with checkpointing off as ours has it. All in fp32, the peer's choice where the file names no
dtype. Batches and threads are equal, and so must the losses be.
MODEL is a folder with the fp32 safetensors of SmolLM2-135M-Instruct, DATA one whose
dataset_info.json knows alpaca_en_demo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from report import Report, gflops
from trainings import Measured, ours, peer, peer_versions

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
LOSS_TOLERANCE = 1e-3

PEER, OURS, PEER_EQUAL = "peer, published settings", "llmray", "peer, checkpointing off"


def run_file(model: str, data: str, steps: int) -> dict[str, Any]:
    """The run that both programs get; every key is one of LLaMA-Factory's."""
    return {
        "model_name_or_path": model,
        "template": "smollm2",
        "default_system": SYSTEM,  # the programs' own defaults differ by a full stop
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": "alpaca_en_demo",
        "dataset_dir": data,
        "cutoff_len": 512,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0e-4,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 42,
        "report_to": "none",
    }


def main() -> None:
    """Measure, compare, publish."""
    options = parse(__doc__)
    run = run_file(options.model, options.data, options.steps)
    plain = {**run, "disable_gradient_checkpointing": True}
    measured: dict[str, list[Measured]] = {PEER: [], OURS: [], PEER_EQUAL: []}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.pairs):
            home = Path(scratch, str(pair))
            threads, python = options.threads, options.peer_python
            measured[PEER].append(peer(run, home / "peer", threads, python))
            measured[OURS].append(ours({**plain, "fp32": True}, home / "ours", threads))
            measured[PEER_EQUAL].append(peer(plain, home / "peer-equal", threads, python))
    compare(measured, gflops(options.threads), options).publish(options.json)


def compare(
    measured: dict[str, list[Measured]], speed: float, options: argparse.Namespace
) -> Report:
    """The table: medians of rates, and of the ratios within each pair."""
    columns = [
        "run",
        "real tokens/s",
        "llmray is",
        "of the ceiling",
        "peak MiB",
        "losses differ by",
    ]
    title = f"SFT, LoRA 8, batch 4, cutoff 512, {options.steps} steps, {options.threads} threads"
    report = Report(title, columns)
    # a frozen weight costs a product forward and one backward: 4 operations a token
    ceiling = speed * 1e9 / (4 * parameters(options.model))
    for name, runs in measured.items():
        ratios = [o.rate / p.rate for o, p in zip(measured[OURS], runs, strict=True)]
        apart = max(
            abs(a - b)
            for mine, theirs in zip(measured[OURS], runs, strict=True)
            for a, b in zip(mine.losses, theirs.losses, strict=True)
        )
        rate = statistics.median(one.rate for one in runs)
        report.rows.append(
            [
                name,
                f"{rate:.0f}",
                "" if name == OURS else f"{statistics.median(ratios):.2f} times",
                f"{rate / ceiling:.0%}",
                f"{statistics.median(one.peak_mib for one in runs):.0f}",
                "" if name == OURS else f"{apart:.1e}",
            ]
        )
        report.details[name] = [vars(one) for one in runs]
        if apart > LOSS_TOLERANCE:
            report.failures.append(f"{name}: losses differ by {apart:.2e}")
        if {one.tokens for one in runs} != {measured[OURS][0].tokens}:
            report.failures.append(f"{name}: not the same number of tokens")
    report.facts = [
        f"The peer's environment: {peer_versions(options.peer_python)}.",
        f"Medians of {options.pairs} alternating rounds of {measured[OURS][0].tokens} real tokens.",
        f"Ceiling: {speed:.0f} GFLOP/s in fp32 products, measured last, would be {ceiling:.0f} "
        "real tokens/s if nothing else took time.",
        f"Last loss of ours: {measured[OURS][0].losses[-1]:.6f}; allowed apart: {LOSS_TOLERANCE}.",
    ]
    return report


def parameters(model: str) -> int:
    """Weights that a token is multiplied with: those of the safetensors file, tied ones once."""
    from safetensors import safe_open

    total = 0
    for path in Path(model).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- the handle is no mapping
                rows, *rest = file.get_slice(name).get_shape()
                total += rows * rest[0] if rest else 0
    return total


def parse(description: str | None, brief: str | None = None) -> argparse.Namespace:
    """The command line; paths may come from the environment. `brief` says what --brief measures."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("peer-python", "model", "data"):
        variable = "LLMRAY_BENCH_" + flag.upper().replace("-", "_")
        default = os.environ.get(variable)
        parser.add_argument(
            f"--{flag}", default=default, required=default is None, help=f"or {variable}"
        )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here")
    if brief is not None:
        parser.add_argument("--brief", action="store_true", help=brief)
    return parser.parse_args()


if __name__ == "__main__":
    main()
