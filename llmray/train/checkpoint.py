"""Checkpoints: what resumes a run, and the only decision from where an attempt starts.

`checkpoint-N` of the run directory holds what LLaMA-Factory's users know (adapter or model,
tokenizer) and below `state/` what a resume needs: tensors as safetensors, everything else as JSON,
no pickle. It is committed through `store`, by all ranks together; nothing else names, finds,
rotates or moves checkpoints. Loops, engines and Ray are left to others.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llmray import store
from llmray.errors import CheckpointError, LlmrayError, StoreError
from llmray.store import FileSum
from llmray.train.parallel import World
from llmray.train.state_files import read_state, write_state

log = getLogger("llmray")

T = TypeVar("T")

STATE = "state"
REPLACED = ".replaced"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# what a run leaves beside its checkpoints; anything else in the directory is the user's own
ARTEFACTS = re.compile(
    r"adapter_(model|config)\..*|model.*\.safetensors|model\.safetensors\.index\.json"
    r"|(trainer_log\.jsonl|trackers\.json|run_arguments\.yaml|(all|train|eval)_results\.json)"
    r"|training_\w+\.png"
)
# these say how a run is started, not what it computes
NOT_COMPARED = ("resume_from_checkpoint", "overwrite_output_dir")


class Resumable(Protocol):
    """Whatever takes part in a checkpoint: nested dicts and lists of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on from here."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint: where, after which update, of what run, made by how many ranks."""

    path: str
    step: int
    fingerprint: dict[str, Any]
    world_size: int


def save(
    run_dir: str,
    step: int,
    *,
    world: World,
    replicated: Mapping[str, dict[str, Any]],
    per_rank: Mapping[str, dict[str, Any]],
    write_files: Callable[[Path], None] | None,
    fingerprint: dict[str, Any],
    keep: int | None,
    spare: int | None = None,
) -> str:
    """Commit `checkpoint-<step>` of the run directory; all ranks call it together.

    Args:
        run_dir: a local path that all ranks see, or a URI.
        step: updates made so far.
        world: the ranks.
        replicated: state that all ranks hold alike; rank 0 writes it.
        per_rank: state of this rank alone.
        write_files: writes weights and tokenizer into a directory; called on rank 0.
        fingerprint: what `find` gives back: what run this is.
        keep: how many checkpoints remain, the newest; None keeps all.
        spare: the step of one that remains however old it is; it counts, and the newest remains.

    Returns: the checkpoint's path.

    Raises:
        LlmrayError: on all ranks, if one of them could not write; no checkpoint was made then.
    """
    target = store.join(run_dir, f"checkpoint-{step}")
    part = _Part(target, world, bool(replicated or per_rank))
    try:
        part.open()
        sums = part.write(replicated, per_rank, write_files)
        part.commit(step, sums, fingerprint)
    finally:
        part.discard()
    if world.is_main:
        _rotate(run_dir, step, keep, spare)
    return target


def find(
    run_dir: str,
    requested: str | bool | None,
    *,
    world: World,
    identity: Mapping[str, Any] | None = None,
) -> Found | None:
    """The checkpoint from which a run starts, or None to start at step 0; all ranks call it.

    One that is named must be intact. Among those of the run directory the newest intact one is
    taken, and every newer one that is passed over is named in a warning.

    Args:
        run_dir: a local path or URI.
        requested: a path or URI; True: there must be one in the run directory; None: there may be
            one; False: start at step 0.
        world: rank 0 decides, all get its answer.
        identity: what must equal the fingerprint's `identity`; checkpoints of other runs are
            passed over as long as there is one that fits.

    Raises:
        CheckpointError: on all ranks; what was asked for is not there, or is damaged.
    """
    return _agree(world, lambda: _find(run_dir, requested, identity))


def load(path: str, *, rank: int) -> dict[str, dict[str, Any]]:
    """The state of one rank, replicated parts included; tensors lie on the host.

    A rank that the checkpoint does not know gets the replicated parts alone.
    """
    with _fetched(path, ["replicated", _rank_name(rank)]) as directory:
        return {
            **read_state(directory, "replicated"),
            **read_state(directory, _rank_name(rank)),
        }


def load_part(run_dir: str, step: int, *keys: str) -> dict[str, Any]:
    """One dict of the replicated state of `checkpoint-<step>`, and no tensor beside it.

    Raises:
        CheckpointError: there is no intact checkpoint that holds it.
    """
    path = store.join(run_dir, f"checkpoint-{step}")
    try:
        store.verify(path)
    except StoreError as error:
        raise CheckpointError(
            f"The best checkpoint cannot be read: {error} An intact one is required. Those that "
            f"remain in {run_dir} hold weights to go on from."
        ) from error
    with _fetched(path, ["replicated"]) as directory:
        return read_state(directory, "replicated", *keys)


@contextmanager
def _fetched(path: str, prefixes: list[str]) -> Iterator[Path]:
    """The folder of a checkpoint's state, its files with these prefixes on this machine."""
    if not store.is_uri(path):
        yield Path(path, STATE)
        return
    with tempfile.TemporaryDirectory(prefix="llmray-") as scratch:
        names = store.list_names(store.join(path, STATE))
        wanted = [name for name in names if name.startswith(tuple(prefixes))]
        store.fetch(store.join(path, STATE), wanted, Path(scratch))
        yield Path(scratch)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key whose values differ between two flat sets of arguments."""
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in NOT_COMPARED
    ]


def clear_way(run_dir: str, requested: str | bool | None, *, overwrite: bool) -> None:
    """Move aside what a new run must not find; called once, before the first attempt.

    A new run (`overwrite`, or False requested) finds nothing of an earlier one; a run that goes on
    from a named checkpoint finds no later one. `requested: True` wins over `overwrite`.
    """
    if isinstance(requested, str):
        inside = store.parent(requested) == run_dir.rstrip("/")
        if inside or not overwrite:
            aside(run_dir, after_step=named_step(requested))
            return
    elif requested is not False and (requested or not overwrite):
        return
    aside(run_dir)


def aside(run_dir: str, *, after_step: int | None = None) -> None:
    """Move earlier checkpoints and artefacts to `.replaced` of the run directory, and say so.

    An older `.replaced` is removed. With `after_step` only checkpoints after that update move.
    """
    names = []
    for name in store.list_names(run_dir):
        match = CHECKPOINT.fullmatch(name)
        is_later = after_step is None or (match and int(match.group(1)) > after_step)
        if is_later and (match or ARTEFACTS.fullmatch(name)):
            names.append(name)
    if not names:
        return
    replaced = store.join(run_dir, REPLACED)
    store.remove(replaced)
    for name in names:
        store.move(store.join(run_dir, name), store.join(replaced, name))
    log.warning(
        "%d earlier files and checkpoints were moved to %s (%.1f MB); the next such run removes it",
        len(names),
        replaced,
        store.size_bytes(replaced) / 1e6,
    )


def newest_step(run_dir: str) -> int | None:
    """The step of the newest committed checkpoint that a run can go on from, or None."""
    steps = [found.step for found in map(_read, _candidates(run_dir)) if isinstance(found, Found)]
    return max(steps, default=None)


def named_step(path: str) -> int:
    """The step of a checkpoint that is named; raises CheckpointError where there is none."""
    return _named(path).step


class _Part:
    """This rank's part in one save; every method is a collective call that fails on all ranks."""

    def __init__(self, target: str, world: World, resumable: bool) -> None:
        self.target = target
        self.world = world
        self.resumable = resumable
        self.directory: Path | None = None
        self._is_owner = world.is_main or store.is_uri(target)

    def open(self) -> None:
        """Agree on the staging directory; where the target is a URI each rank has its own."""
        self.directory = _agree(self.world, self._open)
        if store.is_uri(self.target) and not self.world.is_main:
            self.directory = store.open_staging(self.target)

    def _open(self) -> Path:
        parent = store.parent(self.target)
        for name in store.sweep(parent):
            log.info("removed %s, which a writer that died had left in %s", name, parent)
        if store.is_uri(self.target):
            store.uncommit(self.target)
        return store.open_staging(self.target)

    def write(
        self,
        replicated: Mapping[str, dict[str, Any]],
        per_rank: Mapping[str, dict[str, Any]],
        write_files: Callable[[Path], None] | None,
    ) -> dict[str, FileSum]:
        """Write and sync this rank's files; returns the sums of all ranks'."""

        def write() -> dict[str, FileSum]:
            directory = self._visible()
            with store.explained(self.target):
                if self.world.is_main and write_files is not None:
                    write_files(directory)
                names = [name for name in store.walk(directory) if not name.startswith(f"{STATE}/")]
                names = names if self.world.is_main else []
                if self.world.is_main and self.resumable:
                    names += write_state(directory / STATE, "replicated", replicated)
                if self.resumable:
                    names += write_state(directory / STATE, _rank_name(self.world.rank), per_rank)
                store.share(directory)
                sums = store.seal(directory, names)
            if store.is_uri(self.target):
                store.upload(directory, self.target)
            return sums

        parts = _all_or_none(self.world, write)
        return {name: entry for part in parts for name, entry in part.items()}

    def commit(self, step: int, sums: dict[str, FileSum], fingerprint: dict[str, Any]) -> None:
        """Rank 0 commits; the others learn whether it could."""
        metadata = {
            "step": step,
            "world_size": self.world.world_size,
            "resumable": self.resumable,
            "fingerprint": fingerprint,
        }

        def commit() -> None:
            if store.is_uri(self.target):
                store.commit_remote(self.target, metadata, sums)
            else:
                store.commit(self._visible(), self.target, metadata, sums)

        _agree(self.world, commit)

    def discard(self) -> None:
        """Remove this rank's staging directory if it is still there."""
        if self.directory is not None and self._is_owner:
            store.discard(self.directory)

    def _visible(self) -> Path:
        assert self.directory is not None
        if not self.directory.is_dir():
            raise CheckpointError(
                f"Rank {self.world.rank} does not see {self.directory}, which rank 0 made. All "
                "ranks must see the run directory: put it on shared storage, or name a URI."
            )
        return self.directory


def _agree(world: World, function: Callable[[], T]) -> T:
    """The result of `function`, run on rank 0, on all ranks; or its error, on all ranks."""
    return _outcome(world.broadcast(_attempt(world, function) if world.is_main else None))


def _all_or_none(world: World, function: Callable[[], T]) -> list[T]:
    """The results of all ranks, in rank order; if one failed, the first error, on all ranks."""
    return [_outcome(outcome) for outcome in world.gather(_attempt(world, function))]


def _attempt(world: World, function: Callable[[], T]) -> tuple[T | None, LlmrayError | None]:
    """The result or the error, for the other ranks: they wait for this one."""
    try:
        return function(), None
    except LlmrayError as error:
        return None, error
    except Exception as error:
        told = CheckpointError(
            f"Rank {world.rank} failed while a checkpoint was written or read: "
            f"{type(error).__name__}: {error}. All ranks must succeed; LLMRAY_DEBUG=1 says more."
        )
        told.__cause__ = error
        return None, told


def _outcome(pair: Any) -> Any:
    result, error = pair
    if error is not None:
        raise error
    return result


def _find(
    run_dir: str, requested: str | bool | None, identity: Mapping[str, Any] | None
) -> Found | None:
    if requested is False:
        return None
    if isinstance(requested, str):
        found = _named(requested)
        _verify(found.path)
        return found
    passed_over: list[str] = []
    foreign: Found | None = None
    for path in _candidates(run_dir):
        found_or_reason = _read(path, verify=True)
        if isinstance(found_or_reason, str):
            passed_over.append(found_or_reason)
            continue
        if identity is not None and not _fits(found_or_reason, identity):
            foreign = foreign or found_or_reason
            continue
        if foreign is not None:
            passed_over.append(f"{foreign.path} belongs to another run.")
        _say_passed_over(passed_over, f"Going on from {found_or_reason.path}.")
        return found_or_reason
    if foreign is None and requested:
        raise CheckpointError(
            " ".join([f"{run_dir} holds no checkpoint that a run can go on from.", *passed_over])
            + " resume_from_checkpoint: true requires one. Leave it out to start at step 0."
        )
    _say_passed_over(passed_over, "Starting at step 0." if foreign is None else "")
    return foreign


def _say_passed_over(reasons: list[str], then: str) -> None:
    for reason in reasons:
        log.warning("passed over: %s", reason)
    if reasons and then:
        log.warning("%s", then)


def _fits(found: Found, identity: Mapping[str, Any]) -> bool:
    return dict(found.fingerprint.get("identity", {})) == dict(identity)


def _candidates(run_dir: str) -> list[str]:
    """Paths of all that is called checkpoint-N, the newest first, committed or not."""
    names = [name for name in store.list_names(run_dir) if CHECKPOINT.fullmatch(name)]
    names.sort(key=lambda name: int(name.rpartition("-")[2]), reverse=True)
    return [store.join(run_dir, name) for name in names]


def _read(path: str, *, verify: bool = False) -> Found | str:
    """The checkpoint at `path`, or why no run can go on from it."""
    try:
        manifest = store.verify(path) if verify else store.read_manifest(path)
    except StoreError as error:
        return str(error)
    metadata = manifest.metadata
    if not metadata.get("resumable"):
        return f"{path} holds weights alone (save_only_model: true)."
    return Found(path, metadata["step"], metadata["fingerprint"], metadata["world_size"])


def _named(path: str) -> Found:
    found = _read(path.rstrip("/"))
    if isinstance(found, Found):
        return found
    raise CheckpointError(
        f"resume_from_checkpoint names {path}: {found} An intact checkpoint of llmray is required. "
        "Name another one, or resume_from_checkpoint: true for the newest intact one of the run; "
        "weights alone go into adapter_name_or_path or model_name_or_path."
    )


def _verify(path: str) -> None:
    try:
        store.verify(path)
    except StoreError as error:
        raise CheckpointError(
            f"resume_from_checkpoint names {path}, and {error} resume_from_checkpoint: true takes "
            "the newest intact checkpoint of the run."
        ) from error


def _rotate(run_dir: str, step: int, keep: int | None, spare: int | None) -> None:
    """Remove the oldest checkpoints up to `step`, which was just written, so that `keep` remain.

    That of step `spare` is among them, in place of the oldest, where there is room beside the
    newest. Later ones were passed over when this run began: they count for nothing, and stay.
    """
    if keep is None or keep < 1:
        return
    ours = [path for path in _candidates(run_dir) if int(path.rpartition("-")[2]) <= step]
    committed = [path for path in ours if store.is_committed(path)]
    spared = store.join(run_dir, f"checkpoint-{spare}")
    rest = [path for path in committed if path != spared]
    for path in rest[max(1, keep - (spared in committed)) :]:
        store.remove(path)


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}"
