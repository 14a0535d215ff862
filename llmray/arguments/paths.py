"""Relative paths of a run made absolute, once, in the driver; no worker resolves a path again.

In a job that was submitted to Ray, what a run reads may lie in the working directory that was sent
along; what it writes must not, since Ray deletes that copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from llmray.arguments import environment
from llmray.arguments.loading import replace
from llmray.arguments.run import DEFAULTS, RunArguments
from llmray.arguments.space import LISTS
from llmray.errors import ArgumentsError

log = getLogger("llmray")

# Keys that name a place on disk which a run writes, or reads and writes.
WRITTEN = (
    "cache_dir",
    "tokenized_path",
    "output_dir",
    "offload_folder",
    "export_dir",
    "save_dir",
    "profiler_output_dir",
    "swanlab_logdir",
    "logging_dir",
)
# Keys that name a place on disk which a run only reads.
READ = (
    "dataset_dir",
    "media_dir",
    "new_special_tokens_config",
    "task_dir",
    "kt_optimize_rule",
    "hyper_parallel_args",
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
)
# Keys that name a place on disk or something on a hub.
PLACES_OR_NAMES = (
    "model_name_or_path",
    "adapter_name_or_path",
    "ref_model",
    "ref_model_adapters",
    "reward_model",
    "reward_model_adapters",
    "export_quantization_dataset",
    "generation_config",
)


def base_directory(environ: Mapping[str, str], submitted_job: bool, cwd: Path) -> Path:
    """The folder that relative paths start from.

    Args:
        environ: the environment, of which LLMRAY_HOME goes first.
        submitted_job: whether the driver is a job that was submitted to Ray: its working directory
            is a copy that Ray deletes, so paths start from ~/llmray.
        cwd: the driver's working directory.
    """
    home = environment.home(environ)
    if home is not None:
        return home
    return Path.home() / "llmray" if submitted_job else cwd.absolute()


def absolute(arguments: RunArguments, base: Path, sent: Path | None = None) -> RunArguments:
    """A copy whose relative local paths start from `base`.

    Addresses (s3://…) and names of hubs stay. What may be a hub's name is taken for a path when
    it begins with `.`, `~` or `/`, or lies there.

    Args:
        arguments: the run.
        base: where relative paths start from.
        sent: the working directory of a submitted job; what is only read is taken from there if
            it lies there.

    Raises:
        ArgumentsError: the data of a submitted job is in neither of the two.
    """
    flat = arguments.flat()
    changed: dict[str, Any] = {
        key: _each(flat[key], (base,), must_exist=False)
        for key in WRITTEN
        if _in_use(key, flat[key])
    }
    starts = (base,) if sent is None else (sent, base)
    changed |= {
        key: _each(flat[key], starts, must_exist=False) for key in READ if _in_use(key, flat[key])
    }
    changed |= {
        key: _each(flat[key], starts, must_exist=True) for key in PLACES_OR_NAMES if flat[key]
    }
    if isinstance(flat["dataset_dir"], dict):
        changed["dataset_dir"] = _entries(flat["dataset_dir"], starts)
    if sent is not None:
        _require_data(flat["dataset_dir"], changed["dataset_dir"], base)
    if isinstance(flat["resume_from_checkpoint"], str):
        changed["resume_from_checkpoint"] = _absolute(flat["resume_from_checkpoint"], base)
    if arguments.ray_enabled or flat["tune"]:  # trials always run on Ray
        changed["ray_storage_path"] = _absolute(arguments.cluster.storage_path, base)
    if flat["tune"]:
        changed["tune"] = _searched(flat["tune"], starts)
    differing = {key: value for key, value in changed.items() if value != flat[key]}
    if not differing:
        return arguments
    log.info("relative paths start from %s", base)
    return replace(arguments, **differing)


def _searched(section: Mapping[str, Any], starts: Sequence[Path]) -> dict[str, Any]:
    """The section of a sweep with the places that it lists as absolute paths."""
    found = dict(section)
    if "search" in found:
        found["search"] = {
            key: {kind: _places(key, kind, given, starts) for kind, given in distribution.items()}
            for key, distribution in found["search"].items()
        }
    if "variants" in found:
        found["variants"] = [
            {key: _place(key, value, starts) for key, value in variant.items()}
            for variant in found["variants"]
        ]
    return found


def _places(key: str, kind: str, given: Any, starts: Sequence[Path]) -> Any:
    """What stands under a word of a distribution, with the places that it lists absolute."""
    if kind in LISTS:
        return [_place(key, value, starts) for value in given]
    if kind == "when":  # values of other keys, which are to be found among theirs
        return {name: _place(name, value, starts) for name, value in given.items()}
    return given


def _place(key: str, value: Any, starts: Sequence[Path]) -> Any:
    if key in READ or key in PLACES_OR_NAMES:
        return _each(value, starts, must_exist=key in PLACES_OR_NAMES)
    return _each(value, starts[-1:], must_exist=False) if key in WRITTEN else value


def _entries(sets: Mapping[str, Any], starts: Sequence[Path]) -> dict[str, Any]:
    """The entries of a dataset_info with their files as absolute paths."""
    return {
        name: {**entry, "file_name": _each(entry["file_name"], starts, must_exist=False)}
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
        else entry
        for name, entry in sets.items()
    }


def _in_use(key: str, value: Any) -> bool:
    """Whether a place is named, or a default that every run uses: others are left alone."""
    return bool(value) and (value != DEFAULTS[key] or key == "dataset_dir")


def _each(value: Any, starts: Sequence[Path], *, must_exist: bool) -> Any:
    """The value with its paths absolute, from the first start where they exist, or the last."""
    if isinstance(value, list):
        return [_each(item, starts, must_exist=must_exist) for item in value]
    if not isinstance(value, str):
        return value
    found = next((start for start in starts if (start / value).exists()), None)
    if must_exist and found is None and not value.startswith((".", "~", "/")):
        return value
    return _absolute(value, found or starts[-1])


def _require_data(written: Any, found: Any, base: Path) -> None:
    """Raise where the folder of a submitted job's data is nowhere."""
    if not isinstance(found, str) or not os.path.isabs(found) or os.path.exists(found):
        return
    raise ArgumentsError(
        f"dataset_dir={written} is neither in the working directory that was sent with the job nor "
        f"{found}. The data must be in one of these: send it (`ray job submit --working-dir .` "
        "leaves out what .gitignore names), give a path that the cluster sees, or set LLMRAY_HOME "
        f"instead of {base}."
    )


def _absolute(value: str, base: Path) -> str:
    if "://" in value or value == "ONLINE" or value.startswith("REMOTE:"):
        return value
    return os.path.normpath(base / Path(value).expanduser())
