"""Trains the runs of a JSON file one after the other, on as many ranks as there are; a script.

python -m torch.distributed.run --nproc-per-node 2 preference_on_ranks.py runs.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmray import hub
from llmray.arguments.loading import load
from llmray.data import access
from llmray.run import Context, run
from llmray.train.parallel import World


def train(keys: dict[str, Any], root: Path, world: World) -> None:
    arguments = load(keys, environ={})
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    ref = access.ready(arguments, model_dir, root=root)
    run(arguments, Context(world, keys["output_dir"], ref, model_dir, lambda: None))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    ranks = World.from_environment(120, use_cpu=True)
    for keys in json.loads(path.read_text()):
        train(keys, path.parent / "prepared", ranks)
    ranks.close()
