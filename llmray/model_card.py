"""The README.md of an exported model: from what, by what keys and data, with what results.

Secrets and places of this machine are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from llmray import __version__
from llmray.arguments.paths import PLACES_OR_NAMES, READ, WRITTEN
from llmray.arguments.run import DEFAULTS, RunArguments
from llmray.errors import ArgumentsError

RUN_FILE = "run_arguments.yaml"
RESULTS = "all_results.json"
# what says where and how long a run went, and nothing of the model
LEFT_OUT = {
    *(key for key in (*READ, *WRITTEN) if key not in PLACES_OR_NAMES),
    *("device_map", "master_addr", "master_port", "ray_init_kwargs", "ray_run_name"),
    *("ray_storage_path", "run_name", "logging_dir", "offload_folder", "use_cpu", "report_to"),
}


def card(arguments: RunArguments, trained: Path) -> str:
    """The text of the card, with a head that hubs read.

    Args:
        arguments: of the export, which stand in where the run's own are not known.
        trained: the folder of what was trained: the last adapter, or the model itself.
    """
    run = _run_of(trained) or arguments
    base = name(run.model.model_name_or_path)
    adapters = [name(path) for path in arguments.model.adapter_name_or_path]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "tags": ["llmray", run.finetuning.stage, run.finetuning.finetuning_type],
    }
    if run.data.dataset:
        head["datasets"] = [name(path) for path in run.data.dataset]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name(arguments.export.export_dir)}",
        "",
        f"{base}, trained by stage {run.finetuning.stage} with finetuning_type "
        f"{run.finetuning.finetuning_type}"
        + (f", on {', '.join(head['datasets'])}" if "datasets" in head else "")
        + ".",
    ]
    if adapters:
        lines += ["", f"Merged into it, in order: {', '.join(adapters)}."]
    lines += ["", "## Keys", "", "```yaml", _keys(run).strip(), "```"]
    results = _results(trained)
    if results:
        lines += ["", "## Results", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value:.6g} |" for key, value in sorted(results.items())]
    return "\n".join([*lines, "", f"Written by llmray {__version__}.", ""])


def name(place: str | Path | None) -> str:
    """What a place is called: a hub's name as it is, of a path the last part."""
    text = str(place or "")
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or "://" in text
    return text.rstrip("/").rpartition("/")[2] if is_path else text


def _keys(run: RunArguments) -> str:
    said = {
        key: value
        for key, value in run.flat().items()
        if key not in LEFT_OUT and value != _plain(DEFAULTS[key])
    }
    for key in PLACES_OR_NAMES:
        if key in said:
            value = said[key]
            said[key] = [name(v) for v in value] if isinstance(value, list) else name(value)
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _run_of(folder: Path) -> RunArguments | None:
    """The arguments that a run left in its folder; None where there are none that still load."""
    from llmray.arguments.loading import load

    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        return load(path, environ={})
    except ArgumentsError:  # of a release with other keys
        return None


def _results(folder: Path) -> dict[str, float]:
    path = folder / RESULTS
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if isinstance(value, int | float)}
