"""Stage ppo of an assembled run: prompts, rewards and the step around the engine that is there.

Rewards are functions and servers that this process calls, and reward models that are loaded here;
those on machines of their own have other handles, and nothing else changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmray.arguments import environment
from llmray.arguments.data import DataArguments
from llmray.arguments.run import RunArguments
from llmray.assembly import Core, Training
from llmray.data import templates
from llmray.data.conversation import Conversation, Message
from llmray.data.tokenizer import renderer
from llmray.model import rope
from llmray.model.attention import causal_lm
from llmray.rl import held_out, reward_files, rewards, settings
from llmray.rl.experience import Collector
from llmray.rl.handles import Desk, Handle, InProcess
from llmray.rl.pool import Pool
from llmray.rl.ppo import PpoStep
from llmray.rl.prompts import PromptReader, prompts_of
from llmray.rl.reward_model import ModelReward
from llmray.rl.rewards import Elsewhere, Source, WeightedRewards
from llmray.rl.rollout import Sampler, Texts
from llmray.rl.rollout_log import RolloutLog
from llmray.train import device_memory
from llmray.train.generate import Sampling
from llmray.train.loop import StepResult
from llmray.train.reading import Reader

log = getLogger("llmray")


@dataclass
class Reinforcement:
    """What stage ppo has beside the engine; Resumable."""

    step: PpoStep
    rewards: WeightedRewards
    release_every: int | None = None  # steps after which unused memory is given back

    def __call__(self, step: int) -> StepResult:
        """One step of the loop."""
        done = self.step(step)
        if self.release_every is not None and (step + 1) % self.release_every == 0:
            device_memory.release(self.step.engine.world.device)
        return done

    def state_dict(self) -> dict[str, Any]:
        """The weight of the divergence, and the moments of scores."""
        step = self.step
        return {"control": step.control.state_dict(), "moments": step.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put both back."""
        self.step.control.load_state_dict(state["control"])
        self.step.moments.load_state_dict(state["moments"])

    def close(self) -> None:
        """End the pools of rewards."""
        self.rewards.close()


def prepare(training: Training, directory: Path) -> Reinforcement:
    """Stage ppo of a run that is assembled.

    Args:
        training: its parts.
        directory: where samples of rollouts are written.

    Raises:
        LlmrayError: a reward is not there, or does not fit.
    """
    core, train = training.core, training.train
    assert isinstance(train, Reader), "prompts do not stream"
    arguments, world = core.arguments, core.context.world
    added = weighted_rewards(core)
    _say_bias(arguments)
    show = None
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        show = RolloutLog(directory, arguments.rlhf.rollout_log_steps)
    options = settings.ppo_options(
        arguments, checks_ratio=_is_repeatable(core), checks_sampling=_is_sampled_alike(core)
    )
    lanes = options.per_device * options.accumulation * world.world_size
    step = PpoStep(
        engine=core.engine,
        collector=_collector(core, added, evaluates=False),
        prompts=PromptReader(train.rows.table, train.batches, lanes, world),
        options=options,
        control=settings.kl_control(arguments),
        show=show,
    )
    made = Reinforcement(step, added, arguments.training.torch_empty_cache_steps)
    core.judged = partial(evaluated, core, added)
    training.resumables["reinforcement"] = made
    return made


def evaluated(core: Core, added: WeightedRewards) -> dict[str, float]:
    """The metrics of the held-out prompts; a collective call."""
    world = core.context.world
    tables = {
        name: prompts_of(rows.table, world.rank, world.world_size)
        for name, rows in core.evals.items()
    }
    collector = _collector(core, added, evaluates=True)
    return held_out.judge(collector, tables, settings.kl_estimator(core.arguments), world)


def weighted_rewards(core: Core) -> WeightedRewards:
    """The rewards of a run, each behind a pool of its own; this rank's.

    Raises:
        LlmrayError: one is not there, or does not fit.
    """
    arguments, rank = core.arguments, core.context.world.rank
    elsewhere = core.context.rewards or Elsewhere({}, lambda handle, reason: None, Path.cwd())
    names = arguments.rlhf.reward_models
    weights = arguments.rlhf.reward_weights or (1.0,) * len(names)
    desk = Desk() if _computes_on_all_cores(core) else None
    sources = []
    for name, short, weight in zip(names, rewards.names_of(names), weights, strict=True):
        of_server = rewards.kind_of(name) == "api"
        options = settings.pool_options(arguments, of_server=of_server)
        shared = elsewhere.handles.get(name)
        if not shared and desk is not None and rewards.kind_of(name) == "model":
            options = replace(options, request_timeout_s=math.inf)  # begins when it is waited for
        handles = shared or [_handle(name, core, elsewhere.folder, desk)]
        pool = Pool(handles, options, rank, elsewhere.on_evict)
        sources.append(Source(short, weight, pool, core.context.world.world_size if shared else 1))
    return WeightedRewards(sources, desk)


def _computes_on_all_cores(core: Core) -> bool:
    """Whether torch's operations in this process share its cores; see `Desk`."""
    return core.context.world.device.type == "cpu" and torch.get_num_threads() > 1


def _handle(name: str, core: Core, folder: Path, desk: Desk | None) -> Handle:
    arguments = core.arguments
    if rewards.kind_of(name) == "model":
        model = reward_model(name, arguments, core.context.model_dir)
        return InProcess(name, model, desk=desk)
    return rewards.handle_of(
        name,
        folder=folder,
        api=settings.api_options(arguments, environment.reward_api_key(os.environ)),
        num_requests=arguments.rlhf.reward_num_requests,
    )


def reward_model(
    name: str, arguments: RunArguments, model_dir: Path, *, use_cpu: bool | None = None
) -> ModelReward:
    """A reward model of a run, loaded here.

    Args:
        name: as it is in reward_model.
        arguments: of the run.
        model_dir: the policy's, whose adapter it may be.
        use_cpu: whether it leaves GPUs alone; None: as the run does.

    Raises:
        LlmrayError: it is not there, or does not fit.
    """
    asked = reward_files.run_file(name, arguments, str(model_dir), use_cpu)
    return ModelReward.load(asked, arguments, model_dir)


def _collector(core: Core, added: WeightedRewards, *, evaluates: bool) -> Collector:
    arguments, engine = core.arguments, core.engine
    sampling = Sampling.of(arguments, engine.model.model, core.tokenizer)
    plan = settings.plan(arguments, sampling, evaluates=evaluates)
    texts = Texts(
        core.tokenizer,
        arguments.generating.skip_special_tokens,
        _reading(arguments, core),
        ending(arguments.data, core.tokenizer, sampling.stop_ids),
    )
    return Collector(
        speaker=engine,
        sampler=Sampler(engine, texts, plan),
        rewards=added,
        flat=engine.model.flat,
        pad_id=core.tokenizer.pad_token_id,
        rows=plan.side_by_side,
    )


def ending(
    data_args: DataArguments, tokenizer: Any, stop_ids: Sequence[int]
) -> tuple[int, str] | None:
    """The token that ends a response in a run's format, and what is written after it.

    A reward model reads at the last token of what stage rm has shown it, in ChatML a line break
    after `<|im_end|>`; at any other token its score says nothing. None where no token ends one.
    """
    if data_args.template is None and not tokenizer.chat_template:
        return None
    word = "word"
    probe = Conversation((Message("user", "question"), Message("assistant", word)))
    after = renderer(data_args, tokenizer).turns(probe)[-1].target.rpartition(word)[2]
    ids = tokenizer.encode(after, add_special_tokens=False)
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    if end is None:
        return None
    rest = tokenizer.decode(
        ids[end + 1 :], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return ids[end], str(rest)


def _reading(arguments: RunArguments, core: Core) -> Callable[[str], Message] | None:
    """What tells a response's thought from what it says, where the run's template knows one."""
    if arguments.data.template is None:
        return None
    template = templates.find(arguments.data.template)
    return templates.for_tokenizer(template, core.tokenizer, arguments.data).read


def _is_repeatable(core: Core) -> bool:
    """Whether training reads a response to 1e-4 as sampling did: whole float32, no dropout."""
    model = core.engine.model.model
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    attention: Any = getattr(causal_lm(model).config.get_text_config(), "attention_dropout", 0.0)
    is_whole = core.arguments.model.quantization_bit is None
    return core.engine.precision.name == "fp32" and is_whole and not has_dropout and not attention


def _is_sampled_alike(core: Core) -> bool:
    """Whether a cache gives what the whole text does: no TF32, positions that stay."""
    is_whole = torch.get_float32_matmul_precision() == "highest"
    config = causal_lm(core.engine.model.model).config
    return _is_repeatable(core) and is_whole and not rope.follows_length(config)


def _say_bias(arguments: RunArguments) -> None:
    generating = arguments.generating
    filters = {
        "top_p": generating.top_p if generating.top_p < 1 else None,
        "top_k": generating.top_k or None,
        "repetition_penalty": generating.repetition_penalty
        if generating.repetition_penalty != 1
        else None,
    }
    found = ", ".join(f"{key}={value}" for key, value in filters.items() if value is not None)
    if found:
        log.warning(
            "%s: responses are not drawn from the whole distribution that is learned, so the "
            "divergence is estimated with a bias; top_p: 1.0, top_k: 0 and repetition_penalty: "
            "1.0 have none",
            found,
        )
