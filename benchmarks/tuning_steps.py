"""Steps of LoRA, DoRA and PiSSA beside peft under transformers' Trainer, at equal settings.

    python benchmarks/tuning_steps.py --model SMOLLM2

Both train the same rows in the same order, in fp32, without gradient checkpointing, with the same
optimizer and the same threads: blocks of one length (nothing is padded), and conversations of
different lengths. Two models: MODEL, a folder with the fp32 safetensors of SmolLM2-135M-Instruct,
and a small random one of its architecture. The first step of each run, which warms up and
decomposes, is not counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import synthetic
import torch
from report import Report
from trainings import Measured, measure_steps, ours
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

WORKER = Path(__file__).with_name("peft_steps.py")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True, "pissa_iter": 16},
}
LENGTHS: dict[str, dict[str, Any]] = {
    "equal": {"stage": "pt"},  # texts laid into blocks of cutoff_len
    "mixed": {"stage": "sft", "template": "smollm2"},
}
SMALL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
LOSS_TOLERANCE = 1e-3  # PiSSA's random decompositions differ: there the first loss alone is held
LEAST = 1.0  # of LoRA: at least as fast


def main() -> None:
    """Measure, compare, publish."""
    options = parse()
    disable_progress_bar()
    names = [f"{m} {k} {n}" for m in options.models for n in options.lengths for k in METHODS]
    found: dict[str, list[tuple[Measured, Measured]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        places = {"smollm2": options.model, "small": str(small_model(options.model, Path(scratch)))}
        synthetic.write(Path(scratch, "data"), options.model, 64 * options.steps, (20, 10, 80))
        for pair in range(options.rounds):
            for name in names:
                model, method, lengths = name.split()
                run = run_file(places[model], Path(scratch, "data"), method, lengths, options)
                home = Path(scratch, f"{name.replace(' ', '-')}-{pair}")
                found[name].append(
                    (
                        ours(run, home / "ours", options.threads),
                        measure_steps(
                            [sys.executable, str(WORKER)], run, home / "peft", options.threads
                        ),
                    )
                )
    compare(found, options).publish(options.json)


def run_file(
    model: str, data: Path, method: str, lengths: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The run that both sides get."""
    return {
        "model_name_or_path": model,
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        **METHODS[method],
        **LENGTHS[lengths],
        "dataset": "rows",
        "dataset_dir": str(data),
        "cutoff_len": options.cutoff_len,
        "max_steps": options.steps + 1,
        "per_device_train_batch_size": options.batch,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "learning_rate": 1.0e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "fp32": True,
        "report_to": "none",
    }


def compare(
    found: Mapping[str, list[tuple[Measured, Measured]]], options: argparse.Namespace
) -> Report:
    """The table: medians of a step's seconds, and of the ratios within each pair."""
    columns = ["model", "method", "lengths", "llmray s/step", "peft s/step", "llmray is", "loss"]
    title = (
        f"Steps beside peft under transformers' Trainer, batch {options.batch}, "
        f"cutoff {options.cutoff_len}, {options.threads} threads"
    )
    report = Report(title, columns)
    for name, pairs in found.items():
        model, method, lengths = name.split()
        seconds = [step_seconds(*pair) for pair in pairs]
        ratio = statistics.median(theirs / mine for mine, theirs in seconds)
        first = max(abs(a.losses[0] - b.losses[0]) for a, b in pairs)
        apart = max(abs(x - y) for a, b in pairs for x, y in zip(a.losses, b.losses, strict=True))
        mine, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
        report.rows.append(
            [
                *(model, method, lengths, f"{mine:.3f}", f"{theirs:.3f}", f"{ratio:.2f} times"),
                f"{first:.1e} / {apart:.1e}",
            ]
        )
        report.details[name] = [[vars(one), vars(two)] for one, two in pairs]
        if (first if method == "pissa" else apart) > LOSS_TOLERANCE:
            report.failures.append(f"{name}: losses differ by {apart:.2e}")
        if any(one.tokens != two.tokens for one, two in pairs):
            report.failures.append(f"{name}: not the same number of tokens")
        if method == "lora" and ratio < LEAST:
            report.failures.append(f"{name}: {ratio:.2f} times; at least {LEAST} is asked for")
    report.facts = [
        f"Medians of {options.rounds} rounds of {options.steps} steps after the first.",
        "The last column: how far the first losses are apart, and the farthest of all. PiSSA's "
        "decomposition is random on both sides.",
    ]
    return report


def step_seconds(mine: Measured, theirs: Measured) -> tuple[float, float]:
    """The mean seconds of a step on both sides, the first left out; both have the same rows."""
    steps = list(zip(theirs.step_tokens, mine.step_rates, theirs.step_rates, strict=True))[1:]
    ours_seconds = statistics.mean(tokens / rate for tokens, rate, _ in steps)
    return ours_seconds, statistics.mean(tokens / rate for tokens, _, rate in steps)


def small_model(model: str, scratch: Path) -> Path:
    """A folder with a random model of six narrow layers, and the other's tokenizer."""
    directory = scratch / "small"
    config = AutoConfig.from_pretrained(model)
    for key, value in SMALL.items():
        setattr(config, key, value)
    config.head_dim = SMALL["hidden_size"] // SMALL["num_attention_heads"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for path in Path(model).iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, directory)
    assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 6
    return directory


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder with SmolLM2-135M-Instruct")
    parser.add_argument("--models", nargs="+", default=["smollm2", "small"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cutoff-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
