"""The engine: forward and backward over micro-batches, the update, log-probabilities, its state.

Few primitives, no loop, no Ray. A gradient is that of the loss divided by the count of units over
all ranks and micro-batches of the step, reduced once: the result does not depend on how a batch is
split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llmray.batch import Batch
from llmray.errors import CheckpointError
from llmray.model import pissa
from llmray.model.head import TokenModel, TokenOutput
from llmray.train.generate import Response, Sampling, generate
from llmray.train.losses import Objective, StepObjective, sums_by_sample
from llmray.train.parallel import World
from llmray.train.precision import Precision
from llmray.train.schedules import ByStep, Schedule

AnyObjective = TypeVar("AnyObjective", bound=Objective)


class Reference(Protocol):
    """What answers as the reference of a run."""

    def at_work(self, policy: TokenModel) -> AbstractContextManager[TokenModel]:
        """Inside, the model that is given answers as the reference; the policy does not train."""
        ...


@dataclass(frozen=True)
class StepOutput:
    """One forward and backward over a step's micro-batches.

    `loss` and `metrics` are this rank's share: their sum over ranks is the step's mean over `count`
    units. `num_tokens` counts this rank's real tokens.
    """

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]
    count: int
    num_tokens: int


@dataclass(frozen=True)
class OptimOutput:
    """One update: the gradient's norm before clipping, and the learning rates that were applied.

    `other_rates` are those of the optimizer's named groups, which have rates of their own.
    """

    grad_norm: Tensor  # scalar
    learning_rate: float
    other_rates: dict[str, float] = field(default_factory=dict)


class Engine:
    """A model under training on this rank; Resumable.

    Args:
        model: the token model, on its device.
        trainable: the parameters that train, by their names in `model`; in a fixed order.
        optimizer: over exactly these parameters; None where nothing trains.
        schedule: factor of the learning rate at a step; part of the engine's state.
        world: this rank among all.
        precision: the arithmetic.
        max_grad_norm: clip threshold of the global gradient norm; 0 does not clip.

    Attributes:
        reference: what the policy is compared with, where something is.
    """

    def __init__(
        self,
        model: TokenModel,
        trainable: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        schedule: Schedule,
        *,
        world: World,
        precision: Precision,
        max_grad_norm: float,
    ) -> None:
        self.model = model
        self.world = world
        self.precision = precision
        self.step = 0
        self._start = pissa.of(model)
        self._wrapped = world.wrap(model) if trainable else model
        self._trainable = dict(trainable)
        self._optimizer = optimizer or torch.optim.SGD([torch.zeros(1)])
        self.schedule = schedule
        self.reference: Reference | None = None
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        self._max_grad_norm = max_grad_norm
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=precision.scales_loss)

    @classmethod
    def for_evaluation(cls, model: TokenModel, *, world: World, precision: Precision) -> Engine:
        """An engine of a model of which nothing trains."""
        nothing = ByStep(lambda step: 0.0)
        return cls(model, {}, None, nothing, world=world, precision=precision, max_grad_norm=0.0)

    def begin(self) -> None:
        """Make the model what the first update changes: a PiSSA adapter takes its part of the base.

        All ranks call it; it does nothing where that was done, or there is no such adapter.
        """
        if self._start is not None:
            self._start.begin(self.model.model, self.world.broadcast)

    def forward_backward(
        self, micro_batches: Sequence[Batch], objective: Objective, *, entropy: bool = False
    ) -> StepOutput:
        """Add the gradients of the step's mean loss; every rank brings as many micro-batches.

        Args:
            micro_batches: this rank's.
            objective: what their loss is.
            entropy: whether the objective reads entropies.

        Raises:
            ValueError: if no rank has a unit to train on, or ranks differ in micro-batches.
        """
        device = self.world.device
        local = sum(objective.count(batch) for batch in micro_batches)
        total, number = (int(value) for value in self.world.sum([local, len(micro_batches)]))
        if number != len(micro_batches) * self.world.world_size:
            raise ValueError("ranks differ in their number of micro-batches")
        if total == 0:
            raise ValueError("no rank has a target in this step")
        self.begin()
        micro_batches = [self.referenced(batch.to(device)) for batch in micro_batches]
        objective = self.informed(objective, micro_batches, learns=True)
        self._wrapped.train()
        loss = torch.zeros((), device=device)
        metrics: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with self._reduces(is_last), self.precision.context(device):
                output: TokenOutput = self._wrapped(batch, entropy=entropy)
                part = objective(output, batch)
                summed = part.loss
                if output.aux_loss is not None:  # a mean of its own: weighted by the batch's units
                    summed = summed + output.aux_loss * objective.count(batch)
                # torch averages gradients over ranks: the factor makes it their sum
                self._scaler.scale(summed * (self.world.world_size / total)).backward()
            loss += summed.detach() / total
            for name, value in part.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros((), device=device)) + value / total
        return StepOutput(loss, metrics, total, sum(batch.num_tokens for batch in micro_batches))

    def optim_step(self, *, advances: bool = True) -> OptimOutput:
        """Clip, update, and forget the gradients.

        Args:
            advances: whether this ends a step of the schedule; else `advance` does later.
        """
        rate = self._set_learning_rate()
        self._scaler.unscale_(self._optimizer)
        grads = [p.grad for p in self._trainable.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(
                list(self._trainable.values()), self._max_grad_norm, norm
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.drop_gradients()
        if advances:
            self.advance()
        named = {g["name"]: g["lr"] for g in self._optimizer.param_groups if "name" in g}
        return OptimOutput(norm, rate, named)

    def advance(self) -> None:
        """Go on to the next step of the schedule."""
        self.step += 1

    def drop_gradients(self) -> None:
        """Forget the gradients, whatever they are."""
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, entropy: bool = False, top1: bool = False) -> TokenOutput:
        """The outputs at `batch`'s targets, without gradient and without dropout."""
        self.model.eval()
        with self.precision.context(self.world.device):
            output: TokenOutput = self.model(
                batch.to(self.world.device), entropy=entropy, top1=top1
            )
        return output

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The reference's log-probabilities at `batch`'s targets, (n,); there must be a reference.

        That is `ref_model`, or the policy as it was when the run first started: callers never ask.
        """
        assert self.reference is not None
        self.model.eval()
        with (
            self.reference.at_work(self.model) as model,
            self.precision.context(self.world.device),
        ):
            output: TokenOutput = model(batch.to(self.world.device))
        return output.logprobs

    def referenced(self, batch: Batch) -> Batch:
        """`batch` with what the reference says of its samples, where that is not known yet."""
        if self.reference is None:
            return batch
        mismatched, sums = batch.mismatched, batch.reference
        if sums is None:
            sums = sums_by_sample(self.reference_logprobs(batch), batch)
        if mismatched is not None:
            mismatched = self.referenced(mismatched)
        return replace(batch, reference=sums, mismatched=mismatched)

    def informed(
        self, objective: AnyObjective, batches: Iterable[Batch], *, learns: bool
    ) -> AnyObjective:
        """`objective` with what it reads of a whole step; a collective call where it reads any.

        Args:
            objective: of the step.
            batches: all of this rank, on its device.
            learns: whether it is a step of training.
        """
        if not isinstance(objective, StepObjective) or not objective.needs_statistics:
            return objective
        parts = [objective.statistics(b, lambda of: self.logprobs(of).logprobs) for b in batches]
        sums = self.world.sum(torch.stack([part.cpu() for part in parts]).sum(0).tolist())
        informed: AnyObjective = objective.informed(sums, learns=learns)
        return informed

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[Response]:
        """One response to each prompt of token ids, by the model as it is now, on this rank alone.

        Draws follow torch's global state of random numbers, or each a seed of its own.
        """
        with self.precision.context(self.world.device):
            return generate(self.model.model, prompts, sampling, seeds=seeds)

    def state_dict(self) -> dict[str, Any]:
        """What training changes: trainable weights, the optimizer's moments, schedule, scale.

        And what a PiSSA adapter started as, on which the frozen weights depend.
        """
        moments = {
            name: dict(self._optimizer.state[parameter])
            for name, parameter in self._trainable.items()
            if parameter in self._optimizer.state
        }
        return {
            "step": self.step,
            "trainable": {name: p.detach() for name, p in self._trainable.items()},
            "optimizer": moments,
            "schedule": self.schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "start": {} if self._start is None else dict(self._start.tensors),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            CheckpointError: if names or shapes of the trainable parameters differ.
        """
        if self._start is not None:
            self._start.restore(self.model.model, state["start"])
        self.load_trainable(state["trainable"])
        self.step = state["step"]
        saved = state["optimizer"]
        names = {id(parameter): name for name, parameter in self._trainable.items()}
        ordered = [names[id(p)] for group in self._optimizer.param_groups for p in group["params"]]
        self._optimizer.load_state_dict(
            {
                "state": {i: saved[name] for i, name in enumerate(ordered) if name in saved},
                "param_groups": self._optimizer.state_dict()["param_groups"],
            }
        )
        self._keep_formats(saved)
        self.schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def load_trainable(self, weights: Mapping[str, Tensor]) -> None:
        """Put back the weights that train, and nothing else.

        Raises:
            CheckpointError: if names or shapes differ.
        """
        self._check_names(weights)
        for name, parameter in self._trainable.items():
            parameter.copy_(weights[name])

    def _keep_formats(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Undo torch's cast of loaded moments to their parameter's dtype, which loses bits."""
        for name, parameter in self._trainable.items():
            for key, value in saved.get(name, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self._optimizer.state[parameter][key] = value.to(parameter.device)

    def _check_names(self, saved: Mapping[str, Tensor]) -> None:
        ours = {name: tuple(p.shape) for name, p in self._trainable.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        differing = sorted(set(ours.items()) ^ set(theirs.items()))
        if differing:
            name, shape = differing[0]
            where = "the checkpoint" if name in theirs else "this run"
            raise CheckpointError(
                f"{len(differing)} trainable parameters differ between the checkpoint and this "
                f"run, first {name} {shape} of {where}. A resume needs the same model and tuning "
                "keys. Set overwrite_output_dir: true to start anew."
            )

    def _set_learning_rate(self) -> float:
        factor = self.schedule(self.step)
        for group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        return float(self._optimizer.defaults["lr"] * factor)

    def _reduces(self, is_last: bool) -> AbstractContextManager[object]:
        if is_last or not isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()
