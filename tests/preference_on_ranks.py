"""Runs of preference on one rank or several, for a test that compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def train_together(given: tuple[Path, Runs]) -> None:
    """All runs, one after the other, with their data prepared under a folder, as this rank."""
    root, runs = given
    ranks = World.from_environment(280, use_cpu=True)
    for keys in runs:
        train(keys, root, ranks)
    ranks.close()
