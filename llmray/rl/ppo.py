"""One step of stage ppo: a rollout, its advantages, and the updates that learn from it.

    PpoStep(engine, collector, prompts, options, control, moments)(step) -> StepResult

Written against small protocols: the engine, and rewards behind handles. It knows no Ray, and runs
the same with every role in this process. `max_steps`, saves, logs and the schedule count rollouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from llmray.batch import Batch
from llmray.errors import RewardError, TrainingError
from llmray.rl import advantages, dealing, figures
from llmray.rl.advantages import KlControl, KlEstimator, RunningMoments
from llmray.rl.experience import Collector, Experience
from llmray.rl.rollout import Prompt
from llmray.train.engine import OptimOutput, StepOutput
from llmray.train.loop import StepResult
from llmray.train.losses import Objective
from llmray.train.parallel import World
from llmray.train.ppo_losses import RATIO_TOLERANCE, ActorCritic, GroupRelative
from llmray.train.reading import Work

Estimator = Literal["gae", "grpo"]

# Nats, a mean over tokens, in float32: how far a draw's logprob may be from what is found later.
# Of 22 architectures, folded adapters too, rounding made 9e-7 at most; of ones with 16 layers 3e-6.
SAMPLING_TOLERANCE = 1e-4


class Learner(Protocol):
    """A policy under training; `engine.Engine` is one."""

    world: World

    def forward_backward(
        self, micro_batches: Sequence[Batch], objective: Objective, *, entropy: bool = False
    ) -> StepOutput:
        """Add the gradients of the mean loss over all ranks' micro-batches."""
        ...

    def optim_step(self, *, advances: bool = True) -> OptimOutput:
        """Update."""
        ...

    def advance(self) -> None:
        """Go on to the next step of the schedule."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        ...


@dataclass(frozen=True)
class PpoOptions:
    """How a step learns; the names are those of the keys, without `ppo_`.

    Attributes:
        per_device: responses of a micro-batch.
        accumulation: micro-batches of a mini-batch.
        checks_ratio: whether it is an error when the first mini-batch finds other log-probabilities
            than were found before it: in float32 without dropout.
        checks_sampling: the same of those found at the draws: also without TF32, and with positions
            that do not change with the length.
    """

    per_device: int
    accumulation: int
    epochs: int = 4
    advantage_estimator: Estimator = "gae"
    num_samples: int = 1
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    kl_estimator: KlEstimator = "k1"
    score_norm: bool = False
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    early_stop_kl: float | None = None
    seed: int = 0
    checks_ratio: bool = True
    checks_sampling: bool = True


@dataclass
class Updates:
    """What the updates of a rollout came to: sums of this rank's shares, and the last update."""

    count: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    metrics: dict[str, Tensor] = field(default_factory=dict)
    last: OptimOutput | None = None
    first_ratio_error: Tensor = field(default_factory=lambda: torch.zeros(()))
    num_tokens: int = 0

    def add(self, done: StepOutput, update: OptimOutput) -> None:
        """Take in one update."""
        if self.count == 0:
            self.first_ratio_error = done.metrics["ratio_error"]
        self.count += 1
        self.last = update
        self.loss = self.loss.to(done.loss.device) + done.loss
        self.num_tokens += done.num_tokens
        for name, value in done.metrics.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value


@dataclass
class PpoStep:
    """A `do_step` of the loop; `control` and `moments` are Resumables.

    Args:
        engine: the policy under training.
        collector: experience of it.
        prompts: this rank's prompts of a step.
        options: how.
        control: weight of the divergence from the reference.
        moments: of all scores, for `score_norm`.
        show: is given each rollout's experience after its advantages; for samples in a log.
        pad_id: fills rectangles.
    """

    engine: Learner
    collector: Collector
    prompts: Callable[[int], Sequence[Prompt]]
    options: PpoOptions
    control: KlControl
    moments: RunningMoments = field(default_factory=RunningMoments)
    show: Callable[[int, Experience, Tensor], None] | None = None

    def __call__(self, step: int) -> StepResult:
        """Make rollout number `step`, counted from 0, and learn from it; a collective call.

        Raises:
            RewardError: there is no score, of one response or of all.
            TrainingError: the policy that learns reads otherwise than the one that sampled.
        """
        began, busy = time.perf_counter(), self.collector.rewards.counts().busy_s
        prompts = self.prompts(step)
        read = time.perf_counter() - began
        found = self.collector.collect(prompts, step)
        beta, world = self.control.beta, self.engine.world
        with found.phases.of("update"):
            compared = self._compared(found, step)
            judged = figures.of_experience(found, self.options.kl_estimator, world)
            if not judged.num_scored:
                raise RewardError(
                    f"none of the {judged.num_responses:g} responses of step {step + 1} has a "
                    "score: all were masked, given reward_error_value, or empty. One at least is "
                    "required: see the warnings above, and mend what scores."
                )
            given_ST = self._given(found)
            self.control.update(judged.kl, judged.num_valid)
            updates = self._learn(found, given_ST, step, beta)
            self.engine.advance()
        if self.show is not None:
            self.show(step, found, figures.kl_by_response(found, self.options.kl_estimator))
        assert updates.last is not None, "there is a valid response, so there was an update"
        told = figures.described(judged) | compared
        return StepResult(
            loss=updates.loss / updates.count,
            grad_norm=updates.last.grad_norm,
            learning_rate=updates.last.learning_rate,
            other_rates=updates.last.other_rates,
            num_tokens=found.rollout.num_tokens,
            metrics=self._metrics(found, told, given_ST, updates, beta, busy),
            work=self._work(found, updates),
            num_positions=found.rollout.num_tokens,
            data_seconds=read,
        )

    def _compared(self, found: Experience, step: int) -> dict[str, float]:
        """How far draws are from what the policy says of them later; a collective call."""
        error = figures.sampling_error(found, self.engine.world)
        if error is None:
            return {}
        if self.options.checks_sampling and not error <= SAMPLING_TOLERANCE:
            raise TrainingError(
                f"the tokens of step {step + 1} were drawn at log-probabilities that differ by "
                f"{error:.2g} nats on average from those that the policy gives them when it reads "
                f"the whole text; {SAMPLING_TOLERANCE:g} at most is required in float32. Sampling "
                "(its cache of keys and values, its padding, an adapter that is part of the "
                "weights) reads the text differently from learning. Set use_kv_cache: false, "
                "which samples without a cache and slowly, and please report this model."
            )
        return {"sampling_error": error}

    def _given(self, found: Experience) -> dict[str, Tensor]:
        """What the objective reads of each token, (S, T) each; a collective call."""
        options, world = self.options, self.engine.world
        valid_ST = found.mask_ST & found.valid_S[:, None]
        scores_S = advantages.penalised(
            found.scores_S, found.rollout.ended_S, options.missing_eos_penalty
        )
        if options.score_norm:
            self.moments.update(scores_S[found.valid_S], world)
            scores_S = self.moments.normalised(scores_S)
        given_ST = {"old_logprobs": found.logprobs_ST, "reference": found.reference_ST}
        if options.advantage_estimator == "grpo":
            per_response_S = advantages.group_advantages(
                scores_S, options.num_samples, found.valid_S
            )
            return given_ST | {"advantages": per_response_S[:, None].expand_as(found.logprobs_ST)}
        kl_ST = advantages.kl_estimates(found.logprobs_ST, found.reference_ST, options.kl_estimator)
        rewards_ST = advantages.token_rewards(
            scores_S.nan_to_num(0.0), kl_ST, found.mask_ST, self.control.beta
        )
        if options.whiten_rewards:
            rewards_ST = advantages.whiten(rewards_ST, valid_ST, world, shifts_mean=False)
        values_ST = _values(found)
        raw_ST, returns_ST = advantages.gae(
            rewards_ST, values_ST, found.mask_ST, options.gamma, options.lam
        )
        return given_ST | {
            "advantages": advantages.whiten(raw_ST, valid_ST, world),
            "old_values": values_ST,
            "returns": returns_ST,
        }

    def _objective(self, beta: float) -> Objective:
        options = self.options
        if options.advantage_estimator == "grpo":
            estimate = partial(advantages.kl_estimates, estimator=options.kl_estimator)
            return GroupRelative(options.clip_range, estimate, lambda: beta, options.entropy_coef)
        return ActorCritic(
            options.clip_range, options.value_clip_range, options.value_coef, options.entropy_coef
        )

    def _learn(
        self, found: Experience, given_ST: dict[str, Tensor], step: int, beta: float
    ) -> Updates:
        """Go over the rollout in mini-batches, `epochs` times, unless it is stopped before."""
        options, objective, updates = self.options, self._objective(beta), Updates()
        for epoch in range(options.epochs):
            for rows in self._mini_batches(found, step, epoch):
                micro_batches = [self._batch(found, given_ST, part) for part in rows]
                [count] = self.engine.world.sum([sum(map(objective.count, micro_batches))])
                if not count:
                    continue  # on no rank there is a response with a score
                done = self.engine.forward_backward(
                    micro_batches, objective, entropy=options.entropy_coef > 0
                )
                if not updates.count:
                    self._check_ratio(done)
                # the first one is always learned from: dropout alone may move it this far
                if updates.count and self._stops(done):
                    self.engine.drop_gradients()
                    return updates
                updates.add(done, self.engine.optim_step(advances=False))
        return updates

    def _mini_batches(self, found: Experience, step: int, epoch: int) -> list[list[list[int]]]:
        """Responses by mini-batch and micro-batch, in a random order; as many on every rank."""
        options, world = self.options, self.engine.world
        samples, prompts = options.num_samples, found.rollout.prompts
        lanes = options.per_device * options.accumulation * world.world_size
        [total] = world.sum([float(len(prompts))])
        seed = ((options.seed * 1_000_003 + step) * 1009 + epoch) * 10_007 % 2**64
        chosen = dealing.mini_batches(int(total) // samples, samples, lanes, seed).tolist()
        parts: list[list[int]] = [[] for _ in range(-(-int(total) // lanes))]
        valid = found.valid_S.tolist()
        for row, prompt in enumerate(prompts):
            if valid[row]:
                parts[chosen[prompt.place * samples + row % samples]].append(row)
        most = world.max([float(len(part)) for part in parts])
        numbers = [-(-int(rows) // options.per_device) for rows in most]
        return [
            dealing.micro_batches(part, number, options.per_device)
            for part, number in zip(parts, numbers, strict=True)
        ]

    def _batch(self, found: Experience, given_ST: dict[str, Tensor], rows: Sequence[int]) -> Batch:
        collector = self.collector
        return found.rollout.batch(
            rows, flat=collector.flat, pad_id=collector.pad_id, given_ST=given_ST
        )

    def _check_ratio(self, done: StepOutput) -> None:
        """See that learning finds the log-probabilities that were found before it: ratios of 1."""
        names = ("ratio_off", "ratio_error")
        off, error = self.engine.world.sum([done.metrics[name].item() for name in names])
        if off > 0 and self.options.checks_ratio:
            raise TrainingError(
                f"{off:.2%} of the tokens of the first mini-batch have a probability ratio that "
                f"is off 1 by more than {RATIO_TOLERANCE:g} (mean {error:.2g}), before anything "
                "was learned: in training mode and in mini-batches the policy reads its responses "
                "differently from when it was asked for their log-probabilities. Please report "
                "this model."
            )

    def _stops(self, done: StepOutput) -> bool:
        limit = self.options.early_stop_kl
        if limit is None:
            return False
        [moved] = self.engine.world.sum([done.metrics["approx_kl"].item()])
        return moved > limit

    def _metrics(
        self,
        found: Experience,
        told: dict[str, float],
        given_ST: dict[str, Tensor],
        updates: Updates,
        beta: float,
        busy_before: float,
    ) -> dict[str, Tensor]:
        """This rank's shares of what is logged, with what is `told` of all; a collective call."""
        world, rewards = self.engine.world, self.collector.rewards
        told = told | figures.of_parts(found, rewards.names, world)
        told |= figures.of_phases(found, updates.num_tokens, world)
        busy = rewards.counts().busy_s - busy_before
        told["idle_reward"] = figures.idle_share(found, busy, rewards.num_served, world)
        if "returns" in given_ST:
            valid_ST = found.mask_ST & found.valid_S[:, None]
            told["explained_variance"] = advantages.explained_variance(
                given_ST["old_values"][valid_ST], given_ST["returns"][valid_ST], world
            )
        told |= {"beta": beta, "num_updates": float(updates.count)}
        shares = {name: torch.tensor(value / world.world_size) for name, value in told.items()}
        learned = {name: value / updates.count for name, value in updates.metrics.items()}
        learned.pop("ratio_off")
        learned["ratio_error"] = updates.first_ratio_error
        return shares | learned

    def _work(self, found: Experience, updates: Updates) -> Work:
        """What the updates computed on this rank."""
        passes = updates.num_tokens / max(1, found.rollout.num_tokens)
        targets, squares = int(found.rollout.lengths_S.sum()), found.rollout.num_squares
        return Work(updates.num_tokens, int(passes * targets), int(passes * squares))


def _values(found: Experience) -> Tensor:
    """The values at each token; a rank without responses has none."""
    if found.values_ST is not None:
        return found.values_ST
    assert not found.rollout.responses, "gae needs a value head"
    return torch.zeros(found.mask_ST.shape)
