"""Sweeps of run files that nothing trains, and what their trials might have come to."""

import math

from llmray.arguments.loading import load
from llmray.arguments.tune import sweep_of
from llmray.sweep.results import TrialResult
from llmray.sweep.trials import trials_of

RUN = {
    "model_name_or_path": "m",
    "dataset": "a",
    "do_train": True,
    "output_dir": "saves/one",
    "finetuning_type": "lora",
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "max_steps": 20,
}
GRID = {"lora_rank": {"grid": [4, 8]}, "learning_rate": {"grid": [1e-5, 1e-4, 1e-3]}}


def sweep(section=None, **keys):
    """A run file and its sweep."""
    base = load(RUN | keys | {"tune": section or {"search": GRID}}, environ={})
    return base, sweep_of(base)


def loss(values, step):
    """Falls with steps; least at a learning rate of 1e-4 and the larger rank."""
    rate, rank = values.get("learning_rate", 1e-4), values.get("lora_rank", 8)
    return 1 + 0.1 * (math.log10(rate) + 4) ** 2 + 1 / rank + math.exp(-step / 10)


def trained(found, *, steps=20, total=20):
    """All trials at their last step."""
    return [
        TrialResult(
            trial,
            "finished" if steps == total else "stopped early",
            tuple((step, loss(trial.values, step)) for step in range(5, steps + 1, 5)),
            steps,
            total,
            seconds=2.0 * steps,
        )
        for trial in trials_of(found)
    ]
