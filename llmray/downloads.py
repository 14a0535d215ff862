"""Repositories of models and adapters fetched from hubs, once a node however many processes ask.

A node's processes share a lock and a note of what was fetched; a lock is the kernel's and ends with
the process that holds it. What a repository or a folder must hold is for `hub`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from llmray import store
from llmray.arguments import environment
from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError

log = getLogger("llmray")

HIDDEN = "<token>"
_is_fetched = ContextVar("_is_fetched", default=False)


@dataclass(frozen=True)
class Request:
    """What is asked of a hub; `left_out` are patterns of files, `cache_dir` None its own folder."""

    name: str
    revision: str | None
    cache_dir: str | None
    left_out: tuple[str, ...]
    token: str | None

    def __repr__(self) -> str:
        return f"Request({self.name}, {self.revision})"


@dataclass(frozen=True)
class Hub:
    """A hub of models: how users name it, the key and variable of its token, how it is asked.

    `extra` is llmray's own that installs its package; None where that is always there.
    """

    name: str
    package: str
    extra: str | None
    token_key: str
    token_variable: str
    fetch: Callable[[Request], str]


def _from_hugging_face(request: Request) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0" and not are_progress_bars_disabled():
        disable_progress_bars()
    found: str = snapshot_download(
        request.name,
        revision=request.revision,
        cache_dir=request.cache_dir,
        token=request.token,
        ignore_patterns=list(request.left_out),
    )
    return found


def _from_modelscope(request: Request) -> str:
    from modelscope import snapshot_download

    found: str = snapshot_download(
        request.name,
        # its branches begin at master; main is this key's default, not a branch there
        revision="master" if request.revision == "main" else request.revision,
        cache_dir=request.cache_dir,
        token=request.token,
        ignore_patterns=list(request.left_out),
    )
    return found


def _from_modelers(request: Request) -> str:
    from openmind_hub import snapshot_download

    found: str = snapshot_download(
        request.name,
        revision=request.revision,
        cache_dir=request.cache_dir,
        token=request.token,
        ignore_patterns=list(request.left_out),
    )
    return found


# by the variable that asks for a hub; None where none does
HUBS: dict[str | None, Hub] = {
    None: Hub(
        "the Hugging Face hub",
        "huggingface_hub",
        None,
        "hf_hub_token",
        "HF_TOKEN",
        _from_hugging_face,
    ),
    "USE_MODELSCOPE_HUB": Hub(
        "ModelScope",
        "modelscope",
        "modelscope",
        "ms_hub_token",
        "MODELSCOPE_API_TOKEN",
        _from_modelscope,
    ),
    "USE_OPENMIND_HUB": Hub(
        "Modelers", "openmind_hub", "openmind", "om_hub_token", "OM_HUB_TOKEN", _from_modelers
    ),
}


def chosen(environ: Mapping[str, str]) -> Hub:
    """The hub that this process's environment asks for."""
    return HUBS[environment.other_hub(environ)]


@contextmanager
def as_fetched() -> Iterator[None]:
    """Inside, what a process of this node has fetched is taken as it is, without asking the hub.

    For workers, whose node was made ready before they began: all see the same bytes, even if a
    branch moved meanwhile.
    """
    token = _is_fetched.set(True)
    try:
        yield
    finally:
        _is_fetched.reset(token)


def fetch(
    name: str, key: str, model_args: ModelArguments, revision: str | None, left_out: tuple[str, ...]
) -> Path:
    """The local folder of a repository, fetched unless it is there.

    Args:
        name: of the repository.
        key: that names it, for messages.
        model_args: cache folder and tokens.
        revision: branch, tag or commit; None is the repository's own choice.
        left_out: patterns of files that are not fetched.

    Raises:
        ModelError: the hub cannot be reached, has no such thing, or its package is missing.
    """
    hub = chosen(os.environ)
    secret = getattr(model_args, hub.token_key)
    token = secret.get_secret_value() if secret is not None else None
    token = token or os.environ.get(hub.token_variable) or None
    request = Request(name, revision, model_args.cache_dir, left_out, token)
    note = _note(hub, request)
    taken = _taken(note, since=0 if _is_fetched.get() else None)
    if taken is not None:
        return taken
    asked = time.time_ns()
    with locked(note.with_suffix(".lock")):
        # who held the lock before may have fetched it while this process waited
        taken = _taken(note, since=0 if _is_fetched.get() else asked)
        if taken is not None:
            return taken
        path = Path(_asked(hub, request, key))
        store.write_atomic(note, json.dumps({"path": str(path), "time_ns": time.time_ns()}))
    return path


def _note(hub: Hub, request: Request) -> Path:
    """Where this node notes what it fetched; nodes that share a cache folder have notes apart."""
    parts = [
        socket.gethostname(),
        hub.name,
        request.name,
        request.revision,
        request.cache_dir,
        *request.left_out,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return environment.cache_directory(os.environ) / "downloads" / f"{digest}.json"


def _taken(note: Path, since: int | None) -> Path | None:
    """The folder of a note that was written after a time in nanoseconds; None if there is none."""
    if since is None:
        return None
    try:
        found = json.loads(note.read_text())
        path, time_ns = Path(found["path"]), int(found["time_ns"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if time_ns >= since and path.is_dir() else None


def _asked(hub: Hub, request: Request, key: str) -> str:
    try:
        return hub.fetch(request)
    except ImportError as error:
        if hub.extra is None:
            raise
        raise ModelError(
            f"{key}={request.name} is to come from {hub.name}, which needs a package that is not "
            f"installed: {error}. Required: {hub.package}. Install it on every node: pip install "
            f"'llmray[{hub.extra}]'. Or name a folder."
        ) from error
    except Exception as error:  # each hub's package, and its network library, raises what it likes
        raise _failure(hub, request, key, error) from error


def _failure(hub: Hub, request: Request, key: str, error: Exception) -> ModelError:
    kind, first_line = type(error).__name__, str(error).strip().split("\n")[0]
    if request.token:
        first_line = first_line.replace(request.token, HIDDEN)
    if kind == "RevisionNotFoundError":
        return ModelError(
            f"model_revision={request.revision}: {hub.name} has {request.name}, but no such "
            "branch, tag or commit of it. One that exists is required: correct model_revision."
        )
    return ModelError(
        f"{key}={request.name}: there is no such folder here, and {hub.name} gave none "
        f"({kind}: {first_line}). A folder or the name of a repository that this machine can fetch "
        f"is required: correct it, give a token that may read it ({hub.token_variable} or "
        f"{hub.token_key}), or fetch it where there is a network and name its folder."
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, this process alone of all that use the same file."""
    with store.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
