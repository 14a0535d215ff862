"""Relative paths of a run made absolute, once, in the driver; no worker resolves a path again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from llmray.arguments import environment
from llmray.arguments.run import DEFAULTS, RunArguments

log = getLogger("llmray")

# Keys that name a place on disk whatever lies there.
PLACES = (
    "cache_dir",
    "dataset_dir",
    "media_dir",
    "tokenized_path",
    "output_dir",
    "offload_folder",
    "new_special_tokens_config",
    "export_dir",
    "task_dir",
    "save_dir",
    "profiler_output_dir",
    "swanlab_logdir",
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


def absolute(arguments: RunArguments, base: Path) -> RunArguments:
    """A copy whose relative local paths start from `base`.

    Addresses (s3://…) and names of hubs stay. What may be a hub's name is taken for a path when
    it begins with `.`, `~` or `/`, or lies there.
    """
    flat = arguments.flat()
    changed: dict[str, Any] = {
        key: _each(flat[key], base, must_exist=False) for key in PLACES if _in_use(key, flat[key])
    }
    changed |= {
        key: _each(flat[key], base, must_exist=True) for key in PLACES_OR_NAMES if flat[key]
    }
    if isinstance(flat["resume_from_checkpoint"], str):
        changed["resume_from_checkpoint"] = _absolute(flat["resume_from_checkpoint"], base)
    if arguments.ray_enabled:
        changed["ray_storage_path"] = _absolute(arguments.cluster.storage_path, base)
    differing = {key: value for key, value in changed.items() if value != flat[key]}
    if not differing:
        return arguments
    log.info("relative paths start from %s", base)
    return arguments.replace(**differing)


def _in_use(key: str, value: Any) -> bool:
    """Whether a place is named, or a default that every run uses: others are left alone."""
    return bool(value) and (value != DEFAULTS[key] or key == "dataset_dir")


def _each(value: Any, base: Path, *, must_exist: bool) -> Any:
    if isinstance(value, list):
        return [_each(item, base, must_exist=must_exist) for item in value]
    if not isinstance(value, str):
        return value
    if must_exist and not _is_path(value, base):
        return value
    return _absolute(value, base)


def _is_path(value: str, base: Path) -> bool:
    return value.startswith((".", "~", "/")) or (base / value).exists()


def _absolute(value: str, base: Path) -> str:
    if "://" in value or value == "ONLINE" or value.startswith("REMOTE:"):
        return value
    return os.path.normpath(base / Path(value).expanduser())
