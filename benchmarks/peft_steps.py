"""Trains a run file of llmray with peft under transformers' Trainer, each step timed.

    LLMRAY_PROBE_OUT=FIGURES.jsonl python benchmarks/peft_steps.py RUN.yaml

The rows are those that llmray prepared for the run, in their order, padded to the longest of a
batch; optimizer, rate, clipping, dtype and the adapter's settings are the file's. For
`tuning_steps.py`, which runs it in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from llmray.arguments import environment
from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.data import access, prepared

IGNORED = -100


class Steps(TrainerCallback):
    """Seconds, real tokens and loss of each step, in a file."""

    def __init__(self, path: Path, tokens: Sequence[int]) -> None:
        self.path, self.tokens = path, tokens
        self.started, self.seconds = 0.0, 0.0

    def on_step_begin(self, *words: Any, **named: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *words: Any, **named: Any) -> None:
        """Stop it."""
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        """Write what is known of the step."""
        if "loss" in logs:
            step = {"seconds": self.seconds, "tokens": self.tokens[state.global_step - 1]}
            with self.path.open("a") as file:
                file.write(json.dumps({**step, "loss": float(logs["loss"])}) + "\n")


class InOrder(Trainer):
    """A Trainer whose rows come in the order of the data."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in order."""
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
        )


def main(run_file: Path, figures: Path) -> None:
    """Train and write."""
    arguments = load(run_file)
    rows = read(arguments)
    training, rate = arguments.training, arguments.optimizer.learning_rate
    size, seed = training.per_device_train_batch_size, training.seed
    tokens = [
        sum(len(row["input_ids"]) for row in rows[i : i + size]) for i in range(0, len(rows), size)
    ]
    settings = TrainingArguments(
        output_dir=str(figures.parent / "trainer"),
        max_steps=training.max_steps,
        per_device_train_batch_size=size,
        learning_rate=rate,
        lr_scheduler_type=arguments.optimizer.lr_scheduler_type,
        optim=arguments.optimizer.optim,
        max_grad_norm=arguments.optimizer.max_grad_norm,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = adapted(arguments)
    InOrder(
        model=model,
        args=settings,
        train_dataset=rows,
        data_collator=padded,
        callbacks=[Steps(figures, tokens)],
    ).train()


def adapted(arguments: RunArguments) -> Any:
    """The model in float32 with an adapter as the run's keys say."""
    tuning = arguments.finetuning
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model.model_name_or_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    depth = "pissa" if tuning.pissa_iter < 0 else f"pissa_niter_{tuning.pissa_iter}"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha or 2 * tuning.lora_rank,
        target_modules="all-linear",
        use_dora=tuning.use_dora,
        init_lora_weights=depth if tuning.pissa_init else True,
    )
    torch.manual_seed(arguments.training.seed)
    return get_peft_model(model, config)


def read(arguments: RunArguments) -> list[dict[str, list[int]]]:
    """The rows of the run as llmray prepared them."""
    assert arguments.model.model_name_or_path is not None
    ref = access.ready(
        arguments,
        arguments.model.model_name_or_path,
        root=environment.prepared_directory(os.environ),
    )
    assert isinstance(ref, prepared.PreparedRef)
    table = prepared.open(ref).train
    size = arguments.training.per_device_train_batch_size
    rows = []
    for index in range(min(len(table), size * arguments.training.max_steps)):
        sample = table[index]
        ids = sample.input_ids.tolist()
        labels = [i if t else IGNORED for i, t in zip(ids, sample.target_mask, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, (B, T) each, padded at the end."""
    width = max(len(row["input_ids"]) for row in rows)

    def laid(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": laid("input_ids", 0),
        "labels": laid("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(os.environ["LLMRAY_PROBE_OUT"]))
