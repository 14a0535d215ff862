"""A place for runs of stages dpo, kto and rm on a tiny model: data, models, and runs in here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import make_model, make_tokenizer

from llmray import hub
from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.assembly import Context, Training, assemble
from llmray.data import access
from llmray.run import RunResult, run
from llmray.train.observers import read_log
from llmray.train.parallel import World

LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")

# sigmoid ln 2, hinge 1, ipo (1 / (2 * 0.1)) ** 2, kto_pair and kto 1 - sigmoid(0)
FIRST = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "kto_pair": 0.5}


@dataclass
class Site:
    root: Path
    num_runs: int = 0

    def arguments(self, **keys: Any) -> RunArguments:
        self.num_runs += 1
        base = {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(self.root / "model"),
            "template": "chatml",
            "dataset": "judged" if keys.get("stage") == "kto" else "pairs",
            "dataset_dir": str(self.root / "data"),
            "cutoff_len": 96,
            "lora_rank": 4,
            "learning_rate": 0.01,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "fp32": True,
            "disable_gradient_checkpointing": True,
            "report_to": "none",
            "output_dir": str(self.root / f"run-{self.num_runs}"),
        }
        return load({k: v for k, v in {**base, **keys}.items() if v is not ...}, environ={})

    def context(self, arguments: RunArguments) -> Context:
        model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
        ref = access.ready(arguments, model_dir, root=self.root / "prepared")
        world = World.single(torch.device("cpu"))
        return Context(world, str(arguments.training.output_dir), ref, model_dir, lambda: None)

    def run(self, **keys: Any) -> tuple[Path, RunResult]:
        arguments = self.arguments(**keys)
        result = run(arguments, self.context(arguments))
        return Path(arguments.training.output_dir), result

    def log(self, **keys: Any) -> list[dict[str, Any]]:
        return read_log(self.run(**keys)[0] / "trainer_log.jsonl")

    def assemble(self, **keys: Any) -> Training:
        arguments = self.arguments(**keys)
        return assemble(arguments, self.context(arguments))


def write_data(folder: Path) -> None:
    folder.mkdir()
    words = ["wind", "sea", "dog", "fox", "day", "eat", "tips", "poem"]
    pairs = [
        {
            "instruction": f"Say {i} {words[i % 8]}",
            "chosen": f"The {words[i % 8]} is {words[(3 * i) % 8]}." * (i % 3 + 1),
            "rejected": f"No {words[(i + 1) % 8]}" + " and no" * (i % 4),
        }
        for i in range(14)
    ]
    judged = [
        {"instruction": pair["instruction"], "output": pair[side], "good": side == "chosen"}
        for pair in pairs[:8]
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "judged": {"file_name": "judged.json", "columns": {"kto_tag": "good"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def make_site(root: Path) -> Site:
    """Models `model`, `other` and `wide`, of which 4-bit rows are whole blocks; both data sets."""
    make_tokenizer(root / "model")
    make_model(root / "model", amplify=2.0)
    make_tokenizer(root / "other")
    make_model(root / "other", amplify=3.0)
    make_tokenizer(root / "wide")
    make_model(root / "wide", amplify=2.0, hidden_size=64)
    write_data(root / "data")
    return Site(root)
