"""Ranks as threads: two learn what one does, also where one of them has no prompt at all."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch
from toy_policy import Policy, policy, ppo, prompts, rewards

from llmray.errors import RewardError
from llmray.rl.advantages import KlControl

GRPO = {"advantage_estimator": "grpo", "kl_estimator": "k3", "num_samples": 3}


@dataclass
class Meeting:
    """Where threads exchange what they bring, in the order of their calls."""

    size: int
    brought: dict[int, list[float]] = field(default_factory=dict)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size)

    def exchange(self, rank, values):
        self.brought[rank] = list(values)
        self.barrier.wait(300)
        whole = [self.brought[r] for r in range(self.size)]
        self.barrier.wait(300)
        return whole


@dataclass
class Rank:
    """`parallel.World` of a thread."""

    rank: int
    meeting: Meeting
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def world_size(self):
        return self.meeting.size

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, values):
        return [sum(each) for each in zip(*self.meeting.exchange(self.rank, values), strict=True)]

    def max(self, values):
        return [max(each) for each in zip(*self.meeting.exchange(self.rank, values), strict=True)]

    def wrap(self, model):
        return model


def averaging(engine):
    """The engine, which averages gradients over ranks as torch's wrapper does."""

    class Averaging(Policy):
        def optim_step(self, *, advances=True):
            for parameter in self._trainable.values():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                total = self.world.sum(grad.flatten().double().tolist())
                parameter.grad = (torch.tensor(total) / self.world.world_size).view_as(grad).float()
            return super().optim_step(advances=advances)

    engine.__class__ = Averaging
    return engine


def learned(parts, keys, steps=2, per_device=64, **source):
    """Weights, betas and metrics of each rank, whose prompts are `parts`.

    By default one mini-batch holds all: how it is shuffled makes no difference.
    """
    meeting, found, failed = Meeting(len(parts)), {}, {}
    ranks = [Rank(rank, meeting) for rank in range(len(parts))]
    # made here: threads share the random numbers that weights come from
    engines = [averaging(policy(values=not keys, world=rank)) for rank in ranks]

    def work(rank):
        try:
            engine = engines[rank]
            control = KlControl(0.1, target=0.05, horizon=50)
            options = {"per_device": per_device, "epochs": 2, "score_norm": not keys, **keys}
            of = ppo(engine, [rewards(**source)], control, lambda step: parts[rank], **options)
            told = [of(step).metrics for step in range(steps)]
            weights = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
            found[rank] = weights, control.beta, told
        except Exception as error:
            failed[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    own = [e for e in failed.values() if not isinstance(e, threading.BrokenBarrierError)]
    if own:
        raise own[0]
    return [found[rank] for rank in range(len(parts))]


@pytest.mark.parametrize("keys", [{}, GRPO], ids=["gae", "grpo"])
@pytest.mark.parametrize("cut", [7, 12])
def test_two_ranks_learn_what_one_does(keys, cut):
    """Twelve prompts as 12, as 7 and 5, and as 12 and none."""
    asked = prompts(12)
    check_equal(learned([asked], keys), learned([asked[:cut], asked[cut:]], keys))


@pytest.mark.parametrize("keys", [{}, GRPO], ids=["gae", "grpo"])
@pytest.mark.parametrize("count", [8, 6])
def test_two_ranks_share_each_mini_batch_of_one(keys, count):
    """Several updates a step: of lanes that are full, and of an epoch's last prompts."""
    asked = prompts(count)
    parts = [[p for p in asked if p.place % 4 in lanes] for lanes in ((0, 3), (1, 2))]
    alone, pair = learned([asked], keys, 1, per_device=4), learned(parts, keys, 1, per_device=2)
    check_equal(alone, pair)
    updates = 2 * -(-count * keys.get("num_samples", 1) // 4)
    assert alone[0][2][0]["num_updates"] == updates > 2


def check_equal(one, two):
    """What a rank learned is what two learned together, up to rounding."""
    [(alone, beta, told)], (first, second) = one, two
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], alone, atol=2e-4, rtol=0)
    assert first[1] == second[1] == pytest.approx(beta, rel=1e-4)
    timed = ("share_", "idle_", "_per_second")
    for step, metrics in enumerate(told):
        for name, value in metrics.items():
            if not any(mark in name for mark in timed):
                both = first[2][step][name] + second[2][step][name]
                assert both.item() == pytest.approx(value.item(), abs=2e-3, rel=2e-3), name
    assert set(second[2][0]) == set(told[0])


def test_scores_that_are_missing_on_one_rank_alone_end_nothing():
    def none(asked, responses):
        return [float("nan")] * len(responses)

    asked = prompts(12)
    masked = {"function": none, "on_error": "mask", "max_attempts": 1}
    with pytest.raises(RewardError, match="none of the 12 responses"):
        learned([asked[:7], asked[7:]], {}, steps=1, **masked)
