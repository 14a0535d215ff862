"""Rows of preference that tests write: sets `pairs` and `judged`, with their dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path


def write_preferences(folder: Path, number: int, period: int) -> None:
    """Write both sets with `number` rows each; of `period` judged answers one is unwanted."""
    pairs = [
        {
            "instruction": f"Say {i}.",
            "chosen": "yes " * (i % 5 + 1),
            "rejected": "no " * (i % 3 + 1),
        }
        for i in range(number)
    ]
    judged = [
        {"instruction": f"Say {i}.", "output": "yes " * (i % 5 + 1), "kto_tag": i % period > 0}
        for i in range(number)
    ]
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "judged": {"file_name": "judged.json", "columns": {"kto_tag": "kto_tag"}},
    }
    for name, value in (("pairs", pairs), ("judged", judged), ("dataset_info", info)):
        (folder / f"{name}.json").write_text(json.dumps(value))
