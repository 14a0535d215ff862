"""A tiny policy with a value head and a frozen reference, numbers as texts, rewards in process."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from tiny import build_model
from torch import nn

from llmray.arguments.optimizer import OptimizerArguments
from llmray.model.head import TokenModel
from llmray.rl.advantages import KlControl
from llmray.rl.experience import Collector
from llmray.rl.handles import InProcess
from llmray.rl.pool import Pool, PoolOptions
from llmray.rl.ppo import PpoOptions, PpoStep
from llmray.rl.reward_function import FunctionReward
from llmray.rl.rewards import Source, WeightedRewards
from llmray.rl.rollout import Plan, Prompt, Sampler, Texts
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.generate import Sampling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS

VOCABULARY = 24
STOP, WANTED = 2, 7
SAMPLING = Sampling(stop_ids=(STOP,), pad_id=0, max_new_tokens=6)
CPU = World.single(torch.device("cpu"))


class Numbers:
    """A tokenizer whose text is the ids themselves; 0 to 2 are special."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return " ".join(str(i) for i in ids if i > 2 or not skip_special_tokens)


class WithValues(TokenModel):
    """A token model whose values are a linear map of the last hidden states."""

    def __init__(self, model, *, flat):
        super().__init__(model, flat=flat)
        self.summary = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        self.hidden = None
        model.base_model.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.hidden = output.last_hidden_state

    def forward(self, batch, *, entropy=False, top1=False):
        found = super().forward(batch, entropy=entropy, top1=top1)
        hidden = self.hidden.flatten(0, 1)[batch.targets]
        return replace(found, values=self.summary(hidden).squeeze(1))


class Policy(Engine):
    """An engine whose reference is a frozen copy of what it starts as."""

    frozen: TokenModel

    def reference_logprobs(self, batch):
        with torch.no_grad():
            return self.frozen.eval()(batch).logprobs


def policy(*, values=True, flat=True, rate=3e-3, steps=100, world=CPU, arch="llama", **overrides):
    model = build_model(arch, vocab_size=VOCABULARY, amplify=1.5, **overrides)
    torch.manual_seed(0)
    token_model = (WithValues if values else TokenModel)(model, flat=flat)
    trainable = dict(token_model.named_parameters())
    options = OptimizerArguments(learning_rate=rate, lr_scheduler_type="constant")
    made = Policy(
        token_model,
        trainable,
        optimizers.build(token_model, trainable, options),
        schedules.schedule(options, steps),
        world=world,
        precision=PRECISIONS["fp32"],
        max_grad_norm=1.0,
    )
    made.frozen = TokenModel(copy.deepcopy(model), flat=flat)
    return made


def share_of_wanted(prompts, responses):
    counts = [response.split() for response in responses]
    return [words.count(str(WANTED)) / 6 for words in counts]


def rewards(function=share_of_wanted, weight=1.0, name="share", **options):
    handle = InProcess(name, FunctionReward(name, function))
    return Source(name, weight, Pool([handle], PoolOptions(**options)))


def prompts(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [
        Prompt(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), row, row)
        for row, n in enumerate(lengths)
    ]


def collector(engine, sources, plan=None, flat=True, rows=16):
    plan = plan or Plan(SAMPLING)
    sampler = Sampler(engine, Texts(Numbers()), plan)
    return Collector(engine, sampler, WeightedRewards(sources), flat=flat, pad_id=0, rows=rows)


def ppo(engine, sources, control=None, asked=None, flat=True, sampling=SAMPLING, **options):
    options = PpoOptions(**{"per_device": 8, "accumulation": 1, **options})
    plan = Plan(sampling, num_samples=options.num_samples, side_by_side=16)
    return PpoStep(
        engine,
        collector(engine, sources, plan, flat=flat),
        asked or (lambda step: prompts(16)),
        options,
        control or KlControl(0.02),
    )
