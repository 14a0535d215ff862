"""Trains each of some runs alone, on one rank, and then together with the other rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmray import hub
from llmray.arguments.loading import load
from llmray.data import access
from llmray.run import Context, run
from llmray.train.parallel import World

Runs = list[dict[str, Any]]  # the keys of each


def train(keys: dict[str, Any], root: Path, world: World) -> None:
    """One run of a rank, with its data prepared under `root`."""
    arguments = load(keys, environ={})
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    ref = access.ready(arguments, model_dir, root=root)
    run(arguments, Context(world, keys["output_dir"], ref, model_dir, lambda: None))


def train_all(given: tuple[Path, Runs, Runs]) -> None:
    """Of the first runs every other one alone, then all of the second ones on both ranks."""
    root, alone, together = given
    ranks = World.from_environment(280, use_cpu=True)
    for keys in alone[ranks.rank :: ranks.world_size]:
        train(keys, root / "prepared", World.single(torch.device("cpu")))
    ranks.barrier()
    for keys in together:
        train(keys, root / "prepared-together", ranks)
    ranks.close()
