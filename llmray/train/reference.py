"""The reference of a run: the model that a preference loss compares the policy with.

`ref_model` where one is given; else the policy as it was when the run began, at no cost where an
adapter began at zero: the model without it. Log-probabilities of all rows are computed once and
kept beside the prepared data where rows are seen more than once; then nothing of it stays in
memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from torch import nn

from llmray import hub, store
from llmray.arguments.run import RunArguments
from llmray.data.batches import Batches
from llmray.data.tokenizer import load_tokenizer
from llmray.errors import ModelError, StoreError, TrainingError
from llmray.model import adapters, load, pissa
from llmray.model.head import TokenModel
from llmray.train.engine import Engine, Reference
from llmray.train.parallel import World
from llmray.train.reading import Ahead, Reader, Rows

log = getLogger("llmray")

KIND = "reference log-probabilities"
VERSION = 1  # raise it with every change of what is kept


@dataclass(frozen=True)
class WithoutAdapter:
    """The policy's model without its adapter: what it was at first, if that began at zero."""

    @contextmanager
    def at_work(self, policy: TokenModel) -> Iterator[TokenModel]:
        """See `Reference`."""
        # peft's own context manager also switches requires_grad, on which DDP counts
        layers = [m for m in policy.modules() if "_disable_adapters" in vars(m) or _is_tuner(m)]
        for layer in layers:
            layer._disable_adapters = True  # type: ignore[assignment]
        try:
            yield policy
        finally:
            for layer in layers:
                layer._disable_adapters = False  # type: ignore[assignment]


def _is_tuner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


class AtTheStart:
    """The policy with a copy of what trains, from before anything was learned.

    Args:
        policy: as the run starts it, before a checkpoint is loaded.
    """

    def __init__(self, policy: TokenModel) -> None:
        self._weights = {
            name: parameter.detach().clone()
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }
        start = pissa.of(policy)
        self._pending = None if start is None or start.has_begun else start

    @property
    def is_yet_to_change(self) -> bool:
        """Whether the first update rounds the base anew, after which the start is another."""
        return self._pending is not None and self._pending.ordinary is not None

    @contextmanager
    def at_work(self, policy: TokenModel) -> Iterator[TokenModel]:
        """See `Reference`."""
        if self._pending is not None and self._pending.has_begun:
            # the base keeps a residual from here on: the adapter must be what was taken from it
            for name, tensor in self._pending.tensors.items():
                own = f"model.{name.removesuffix('.weight')}.{pissa.ADAPTER}.weight"
                self._weights[own] = tensor.to(self._weights[own])
            self._pending = None
        self._swap(policy)
        try:
            yield policy
        finally:
            self._swap(policy)

    def _swap(self, policy: TokenModel) -> None:
        for name, parameter in policy.named_parameters():
            if name in self._weights:
                own = parameter.data
                parameter.data = self._weights[name]
                self._weights[name] = own


@dataclass(frozen=True)
class OfItsOwn:
    """A model of its own, frozen."""

    model: TokenModel

    @contextmanager
    def at_work(self, policy: TokenModel) -> Iterator[TokenModel]:
        """See `Reference`."""
        yield self.model


def is_of_its_own(arguments: RunArguments) -> bool:
    """Whether the reference is another model than the policy."""
    return bool(arguments.rlhf.ref_model or arguments.rlhf.ref_model_adapters)


def load_own(
    arguments: RunArguments, model_dir: Path, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The model of `ref_model`, with its adapters added, frozen.

    Args:
        arguments: of the run.
        model_dir: the policy's folder, which is taken where only adapters are named.
        dtype: of the weights.
        device: where they go.

    Raises:
        ModelError: it is not there, or knows fewer tokens than the policy.
    """
    options = arguments.rlhf
    folder = _folder(arguments, model_dir)
    theirs = arguments.model.model_copy(
        update={
            "model_name_or_path": options.ref_model or arguments.model.model_name_or_path,
            "adapter_name_or_path": (),
            "quantization_bit": options.ref_model_quantization_bit,
            "train_from_scratch": False,
        }
    )
    loaded = load.load_model(
        folder,
        theirs,
        dtype=dtype,
        device=device,
        gradient_checkpointing=False,
        cutoff_len=arguments.data.cutoff_len,
    )
    ours = len(load_tokenizer(model_dir, arguments.model, arguments.data.template))
    known = loaded.get_input_embeddings().weight.shape[0]
    if known < ours:
        raise ModelError(
            f"ref_model={options.ref_model} knows {known} tokens, the policy's tokenizer has "
            f"{ours}. A reference with the policy's vocabulary is required: name another ref_model."
        )
    merged = adapters.merge(loaded, options.ref_model_adapters, arguments.model)
    merged.requires_grad_(False)
    return merged.eval()


def of_policy(arguments: RunArguments, policy: TokenModel) -> Reference:
    """The policy as it is now, before anything was learned, for as long as the run lasts."""
    tuning = arguments.finetuning
    continues = arguments.model.adapter_name_or_path and not tuning.create_new_adapter
    if tuning.finetuning_type == "lora" and not continues and not tuning.pissa_init:
        return WithoutAdapter()
    return AtTheStart(policy)


def _folder(arguments: RunArguments, model_dir: Path) -> Path:
    name = arguments.rlhf.ref_model
    return model_dir if name is None else hub.resolve(name, arguments.model, kind="reference")


# of the policy's keys, those that decide what the reference says
_DECIDE = ("adapter_name_or_path", "model_name_or_path", "quantization_bit")


def identity(arguments: RunArguments, model_dir: Path) -> str:
    """A digest that tells the reference of a run from others, whatever its weights are by then."""
    options, tuning, model = arguments.rlhf, arguments.finetuning, arguments.model
    own = is_of_its_own(arguments)
    names = options.ref_model_adapters if own else model.adapter_name_or_path
    settings = {
        key: value
        for key, value in model.model_dump(mode="json").items()
        if key in _NUMERIC and key not in _DECIDE
    }
    training = arguments.training
    found = {
        "version": VERSION,
        "model": hub.identity(_folder(arguments, model_dir)),
        "adapters": [_adapter_digest(name, arguments) for name in names],
        "bits": options.ref_model_quantization_bit if own else model.quantization_bit,
        "settings": settings,
        "numbers": [training.bf16, training.fp16, training.fp32, tuning.pure_bf16],
        "start": [model.train_from_scratch, tuning.pissa_init, tuning.pissa_iter, training.seed]
        if model.train_from_scratch or tuning.pissa_init
        else None,
    }
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_NUMERIC = (
    "flash_attn",
    "rope_scaling",
    "quantization_method",
    "quantization_type",
    "double_quantization",
    "upcast_layernorm",
    "upcast_lmhead_output",
)


def _adapter_digest(name: str, arguments: RunArguments) -> str:
    folder = hub.resolve(name, arguments.model, kind="adapter")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def logps(engine: Engine, rows: Rows, per_device: int, ahead: Ahead) -> np.ndarray:
    """The reference's log-probability of each answer of each row; a collective call.

    Rows are dealt over the ranks, and every rank gets all.

    Args:
        engine: with the reference.
        rows: of a table.
        per_device: rows of one forward pass.
        ahead: how reading runs ahead.

    Returns: (num_rows, 2) float64: of the chosen and the rejected answer, or of the row's answer
        and the mismatched one.

    Raises:
        TrainingError: one is no number.
    """
    world, count = engine.world, rows.table.num_rows
    batches = Batches(
        rows.table.lengths, per_device, 1, world.world_size, world.rank, seed=0, order="sequential"
    )
    reader = Reader(rows, batches, ahead, batches.steps_per_epoch)
    found = np.zeros((count, 2))
    for step in range(batches.steps_per_epoch):
        for read in reader.step(step):
            if not read.rows:
                continue
            batch = engine.referenced(read.to(world.device))
            assert batch.reference is not None
            values = batch.reference
            if batch.mismatched is not None:
                assert batch.mismatched.reference is not None
                values = torch.stack([values, batch.mismatched.reference], 1)
            found[list(batch.rows)] = values.view(-1, 2).cpu().numpy()
    reader.close()
    whole = np.array(world.sum(found.ravel().tolist())).reshape(count, 2)
    wrong = np.flatnonzero(~np.isfinite(whole).all(1))
    if len(wrong):
        raise TrainingError(
            f"the reference's log-probability of row {wrong[0]} of the table, counted from 0, is "
            f"{whole[wrong[0]].tolist()}. Finite numbers are required. Look at it with llmray "
            "render, or compute in bf16 or fp32."
        )
    return whole


class Kept:
    """Log-probabilities of a reference beside the prepared data that they are of.

    Rank 0 reads and writes; every rank gets what it read.

    Args:
        prepared: where the data lies.
        digest: of the reference.
        world: this rank among all.
    """

    def __init__(self, prepared: str, digest: str, world: World) -> None:
        self.path = f"{prepared}.reference-{digest}"
        self._world = world

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other run of this machine be in such a block for the same reference and data."""
        if not self._world.is_main:
            yield
            return
        try:
            lock = open(f"{self.path}.lock", "a")  # noqa: SIM115  # closed below
        except OSError:  # a folder of somebody else's: nothing can be kept there either
            yield
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray] | None:
        """By table, (num_rows, 2) each; None unless all tables are there. A collective call."""
        found = self._read(sizes) if self._world.is_main else None
        return self._world.broadcast(found)

    def _read(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray] | None:
        if not store.is_committed(self.path):
            return None
        store.verify(self.path)
        found = {}
        for name, size in sizes.items():
            file = Path(self.path, _file(name))
            if not file.is_file():
                return None
            found[name] = np.load(file)
            if found[name].shape != (size, 2):
                return None
        return found

    def write(self, tables: Mapping[str, np.ndarray]) -> None:
        """Keep them, where this user may write."""
        if not self._world.is_main:
            return
        try:
            with store.staging(self.path) as folder:
                for name, values in tables.items():
                    np.save(folder / _file(name), values)
                store.commit(folder, self.path, {"kind": KIND})
        except StoreError as error:
            log.warning("the reference's log-probabilities are not kept: %s", error)


def _file(table: str) -> str:
    return f"{hashlib.sha256(table.encode()).hexdigest()[:16]}.npy"


def explained(reference: Reference | None, arguments: RunArguments) -> str:
    """What the reference is, in words."""
    if isinstance(reference, OfItsOwn):
        return f"the reference is {arguments.rlhf.ref_model or 'the model with other adapters'}"
    if isinstance(reference, WithoutAdapter):
        return "the reference is the model without its new adapter"
    return "the reference is a copy of what trains, as it was at the start"
