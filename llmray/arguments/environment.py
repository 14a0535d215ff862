"""Every environment variable that llmray reads, once: its name, its form, its meaning.

A variable that a library reads by itself, and that llmray only passes on, is not listed here,
except secrets: these must reach the workers without entering Ray's runtime environment.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmray.errors import ArgumentsError

Kind = Literal["flag", "count", "text", "path", "names", "level"]

TRUE = ("1", "true", "y", "yes", "on")
FALSE = ("0", "false", "n", "no", "off")


@dataclass(frozen=True)
class Variable:
    """One environment variable: the form of its value, and what it does."""

    kind: Kind
    meaning: str


VARIABLES: dict[str, Variable] = {
    "USE_RAY": Variable("flag", "Train in workers that Ray starts, where use_ray is not given."),
    "LLMRAY_HOME": Variable("path", "Folder that relative paths of a run start from."),
    "LLMRAY_CACHE": Variable("path", "Folder of converted models and prepared data."),
    "LLMRAY_DRIVER_CACHE": Variable(
        "path", "Set by a driver for its workers: its LLMRAY_CACHE, where their node has none."
    ),
    "LLMRAY_DEBUG": Variable("flag", "Show tracebacks."),
    "NO_COLOR": Variable("text", "Any value: nothing is coloured on a terminal."),
    "LLMRAY_PASS_ENV": Variable("names", "Further variables that are passed on to workers."),
    "RECORD_VRAM": Variable("flag", "Log the most device memory so far, in gigabytes of 2^30."),
    "ALLOW_EXTRA_ARGS": Variable("flag", "Leave out unknown keys with a warning."),
    "DISABLE_VERSION_CHECK": Variable("flag", "Do not compare the versions of the nodes."),
    "LLAMAFACTORY_VERBOSITY": Variable("level", "How much llmray says: DEBUG, INFO, WARN, ERROR."),
    "FORCE_TORCHRUN": Variable("flag", "Start torchrun although there is one device."),
    "NPROC_PER_NODE": Variable("count", "Processes that torchrun starts on this machine."),
    "NNODES": Variable("count", "Machines of a run under torchrun."),
    "NODE_RANK": Variable("count", "Number of this machine, from 0."),
    "MASTER_ADDR": Variable("text", "Address of the machine with NODE_RANK 0."),
    "MASTER_PORT": Variable("count", "Free port of that machine."),
    "OPTIM_TORCH": Variable("flag", "Let torch's CUDA memory grow in place, in workers; on."),
    "NPU_JIT_COMPILE": Variable("flag", "Compile operators of an Ascend NPU just in time; off."),
    "FORCE_CHECK_IMPORTS": Variable(
        "flag", "Refuse model code from a hub where a package that it names is missing."
    ),
    "USE_MODELSCOPE_HUB": Variable(
        "flag", "Models come from ModelScope, sets of data where they are there."
    ),
    "USE_OPENMIND_HUB": Variable(
        "flag", "Models come from Modelers, sets of data where they are there."
    ),
    "API_HOST": Variable("text", "Address of the reward server, where --host is not given."),
    "API_PORT": Variable("count", "Port of the reward server, where --port is not given."),
    "API_KEY": Variable(
        "text",
        "Token that callers of the reward server must bring, where --token-file is not given.",
    ),
    "REWARD_API_KEY": Variable("text", "Token that reward servers are sent in stage ppo."),
    "WANDB_DISABLED": Variable("flag", "Leave wandb out of the trackers."),
    "WANDB_PROJECT": Variable("text", "Project in wandb; goes before the key project."),
}
# Libraries read these by themselves; llmray hands them to every worker.
PASSED_PREFIXES = ("HF_", "NCCL_", "GLOO_", "MALLOC_", "TRANSFORMERS_", "WANDB_", "SWANLAB_")
# Hubs beside Hugging Face's, by the variable that asks for them.
OTHER_HUBS = {"USE_MODELSCOPE_HUB": "ModelScope", "USE_OPENMIND_HUB": "Modelers"}

# Variables whose values must not be seen; libraries read them by themselves.
SECRETS: tuple[str, ...] = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MODELSCOPE_API_TOKEN",
    "OM_HUB_TOKEN",
    "SWANLAB_API_KEY",
    "WANDB_API_KEY",
    "REWARD_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


def use_ray(environ: Mapping[str, str]) -> bool | None:
    """What USE_RAY says, None where it is not set."""
    return flag(environ, "USE_RAY")


def allow_extra_args(environ: Mapping[str, str]) -> bool:
    """Whether unknown keys are left out with a warning."""
    return bool(flag(environ, "ALLOW_EXTRA_ARGS"))


def version_check_disabled(environ: Mapping[str, str]) -> bool:
    """Whether the nodes' versions are not compared."""
    return bool(flag(environ, "DISABLE_VERSION_CHECK"))


def allocator(environ: Mapping[str, str]) -> dict[str, str]:
    """What OPTIM_TORCH sets for processes that compute on CUDA: memory segments that can grow.

    Batches differ in length at every step, which fragments segments of fixed size. Nothing where
    it is off, or where the user has set torch's allocator.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if flag(environ, "OPTIM_TORCH") is False or any(environ.get(name) for name in names):
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def compiles_on_npu(environ: Mapping[str, str]) -> bool:
    """Whether operators of an NPU are compiled just in time."""
    return bool(flag(environ, "NPU_JIT_COMPILE"))


def imports_checked(environ: Mapping[str, str]) -> bool:
    """Whether model code from a hub needs every package that it names."""
    return bool(flag(environ, "FORCE_CHECK_IMPORTS"))


def api(environ: Mapping[str, str]) -> tuple[str, int, str | None]:
    """Address, port and token of the reward server; other machines reach it where that is said.

    Raises:
        ArgumentsError: if API_PORT is no number.
    """
    host = _text(environ, "API_HOST") or "127.0.0.1"
    return host, count(environ, "API_PORT", 8000, least=0), _text(environ, "API_KEY")


def reward_api_key(environ: Mapping[str, str]) -> str | None:
    """The token that reward servers are sent."""
    return _text(environ, "REWARD_API_KEY")


def other_hub(environ: Mapping[str, str]) -> str | None:
    """The variable that asks for a hub beside Hugging Face's, None where none does."""
    return next((name for name in OTHER_HUBS if flag(environ, name)), None)


def is_submitted(environ: Mapping[str, str]) -> bool:
    """Whether this process is the driver of a job that was submitted to Ray."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environ  # set by Ray's job supervisor


def debug(environ: Mapping[str, str]) -> bool:
    """Whether tracebacks are shown."""
    return bool(flag(environ, "LLMRAY_DEBUG"))


def no_colour(environ: Mapping[str, str]) -> bool:
    """Whether nothing is to be coloured on a terminal."""
    return _text(environ, "NO_COLOR") is not None


def home(environ: Mapping[str, str]) -> Path | None:
    """The folder that relative paths start from, None where LLMRAY_HOME is not set."""
    return path(environ, "LLMRAY_HOME")


# how a driver's LLMRAY_CACHE reaches workers
DRIVER_CACHE = "LLMRAY_DRIVER_CACHE"


def cache_directory(environ: Mapping[str, str]) -> Path:
    """The folder of converted models and prepared data: LLMRAY_CACHE or ~/.cache/llmray.

    A Ray worker without an LLMRAY_CACHE of its node takes the driver's.
    """
    named = path(environ, "LLMRAY_CACHE") or path(environ, DRIVER_CACHE)
    return named or Path.home() / ".cache" / "llmray"


def prepared_directory(environ: Mapping[str, str]) -> Path:
    """The folder of this machine's prepared data."""
    return cache_directory(environ) / "prepared"


def passed_on(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The names in LLMRAY_PASS_ENV."""
    names = _text(environ, "LLMRAY_PASS_ENV") or ""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets that are set, for the workers' memory alone."""
    return {name: environ[name] for name in SECRETS if environ.get(name)}


def verbosity(environ: Mapping[str, str]) -> int:
    """The level of log lines, INFO where nothing is set.

    Raises:
        ArgumentsError: if LLAMAFACTORY_VERBOSITY names no level.
    """
    name = (_text(environ, "LLAMAFACTORY_VERBOSITY") or "INFO").upper()
    levels = logging.getLevelNamesMapping()
    if name not in levels:
        known = ", ".join(sorted(levels, key=levels.__getitem__))
        raise ArgumentsError(
            f"LLAMAFACTORY_VERBOSITY={name} is no logging level. Set it to one of {known}."
        )
    return levels[name]


def flag(environ: Mapping[str, str], name: str) -> bool | None:
    """A variable that is on or off, None where it is not set.

    Raises:
        ArgumentsError: if its value is neither.
    """
    text = _text(environ, name)
    if text is None:
        return None
    if text.lower() not in TRUE + FALSE:
        raise ArgumentsError(f"{name}={text} is neither on nor off. Set it to 1 or 0, or unset it.")
    return text.lower() in TRUE


def count(environ: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    """A variable that holds a whole number of at least `least`.

    Raises:
        ArgumentsError: if it holds something else.
    """
    text = _text(environ, name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ArgumentsError(f"{name}={text} is not a whole number of at least {least}. Mend it.")
    return int(text)


def path(environ: Mapping[str, str], name: str) -> Path | None:
    """A variable that names a folder, made absolute, None where it is not set."""
    text = _text(environ, name)
    return None if text is None else Path(text).expanduser().absolute()


def _text(environ: Mapping[str, str], name: str) -> str | None:
    assert name in VARIABLES, f"{name} is not declared in VARIABLES"
    return environ.get(name, "").strip() or None
