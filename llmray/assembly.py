"""The parts of a run put together: data, model, engine, plan of steps, and what judges it.

What is done with them is for `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from llmray import comparison, hub
from llmray.arguments.best import best_metric, compares_evaluations
from llmray.arguments.loading import replace
from llmray.arguments.run import RunArguments
from llmray.data import prepared
from llmray.data.access import StreamRef
from llmray.data.prepared import PreparedRef, Table
from llmray.data.tokenizer import load_tokenizer
from llmray.model import embedding, export, kernels, load, tuning, upcast, value_head
from llmray.model.attention import causal_lm, why_not_flat
from llmray.model.fitting import Room, choose_recomputation
from llmray.model.head import TokenModel, set_balance
from llmray.rl import reward_files
from llmray.rl.rewards import Elsewhere
from llmray.train import device_memory, optimizers, precision, reference, schedules
from llmray.train.engine import Engine
from llmray.train.feed import Feed, StreamReader, open_feed
from llmray.train.generate import Sampling
from llmray.train.loop import Cadence, Progress, cadence
from llmray.train.losses import LearningObjective, StageObjective
from llmray.train.observers import Observer
from llmray.train.parallel import World
from llmray.train.predict import Predictor
from llmray.train.random_state import RandomState, seed_everything
from llmray.train.reading import Ahead, Reader, Rows
from llmray.train.stages import STAGES, temperature
from llmray.train.stopping import Best, EarlyStopping, Judge

log = getLogger("llmray")


@dataclass
class Context:
    """What a run is given from outside.

    `stop` is asked by rank 0 at step borders and gives a reason to stop, or None. `report` is
    called by all ranks at saves and evaluations with metrics and the checkpoint's path.
    """

    world: World
    run_dir: str  # checkpoints, logs and final artefacts; a local path or a URI
    prepared: PreparedRef | StreamRef
    model_dir: Path
    stop: Callable[[], str | None]
    observers: tuple[Observer, ...] = ()
    report: Callable[[dict[str, float], str | None], None] | None = None
    rewards: Elsewhere | None = None  # None: all are in this process
    attempt: int = 1  # above 1: workers were lost, and this goes on from their last checkpoint
    group: str | None = None  # what this run and others are called together in trackers
    num_sharing: int = 1  # runs of that group, which share what is known of the reference


@dataclass
class Core:
    """What evaluating needs, with training or without it.

    `arguments` hold every choice that was left open as it was made.
    """

    arguments: RunArguments
    context: Context
    engine: Engine
    tokenizer: Any
    evals: dict[str, Rows]
    objective: StageObjective
    judged: Callable[[], dict[str, float]] | None = None  # in place of losses of the rows

    @property
    def ahead(self) -> Ahead:
        """How reading runs ahead, by the keys of the data loader."""
        return reading_ahead(self.arguments, self.context.world.device)

    @property
    def ranks(self) -> bool:
        """Whether the run is about rewards of pairs."""
        return STAGES[self.arguments.finetuning.stage].scores

    @property
    def samples(self) -> bool:
        """Whether the run learns from its own responses."""
        return STAGES[self.arguments.finetuning.stage].samples

    def predictor(self, stop: Callable[[], str | None]) -> Predictor:
        """What generates responses to the evaluation rows."""
        arguments = self.arguments
        return Predictor(
            self.engine,
            self.tokenizer,
            Sampling.for_evaluation(arguments, self.engine.model.model, self.tokenizer),
            per_device=arguments.training.per_device_eval_batch_size,
            seed=arguments.training.seed,
            skips_special=arguments.generating.skip_special_tokens,
            stop=stop,
        )

    def rows(self, samples: Table) -> Rows:
        """Rows of a table in the layout that the model takes."""
        return Rows(samples, flat=self.engine.model.flat, pad_id=self.tokenizer.pad_token_id)


@dataclass
class Training:
    """What training needs beside the core, and what a checkpoint of it holds."""

    core: Core
    train: Reader | StreamReader
    cadence: Cadence
    progress: Progress
    judge: Judge
    random: RandomState
    resumables: dict[str, LearningObjective] = field(default_factory=dict)  # further ones

    def write_files(self, directory: Path) -> None:
        """Write what users take from a run: weights, tokenizer, the run file."""
        core = self.core
        whole = core.arguments.finetuning.finetuning_type != "lora"
        dtype = core.engine.precision.load_dtype if whole else None
        model = core.engine.model
        if model.value_head is not None:
            value_head.write(model.value_head, directory)
        export.write_weights(model.model, directory, core.tokenizer, dtype=dtype)
        core.arguments.save(directory / "run_arguments.yaml")

    def fingerprint(self) -> dict[str, Any]:
        """What a resume compares: `identity` must be equal, `arguments` are only reported."""
        context, arguments = self.core.context, self.core.arguments
        identity = {
            "model": hub.identity(context.model_dir),
            "data": context.prepared.key,
            "stage": arguments.finetuning.stage,
            "finetuning_type": arguments.finetuning.finetuning_type,
        }
        if comparison.uses_reference(arguments):
            identity["reference"] = reference.identity(arguments, context.model_dir)
        return {"identity": identity, "arguments": arguments.flat()}


def assemble(arguments: RunArguments, context: Context) -> Training:
    """The parts of a run that trains; its weights are equal on all ranks."""
    world, options = context.world, arguments.training
    seed_everything(options.seed)
    numbers = precision.choose(arguments, world.device)
    kernels.require_gradients(arguments.model.flash_attn, world.device)
    feed = open_feed(arguments, context.prepared, context.model_dir, world)
    pace = cadence(options, feed.steps_per_epoch)
    recomputes = _needs_checkpointing(arguments, context, feed.lengths, numbers.name)
    resolved = _resolved(arguments, numbers, recomputes=recomputes)
    own = comparison.load_own(resolved, context.model_dir, numbers.load_dtype, world.device)
    model = _token_model(resolved, context, numbers, flat=comparison.takes_flat_rows(own))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine = Engine(
        model,
        trainable,
        optimizers.build(model, trainable, arguments.optimizer, arguments.finetuning),
        schedules.schedule(arguments.optimizer, pace.total_steps),
        world=world,
        precision=numbers,
        max_grad_norm=arguments.optimizer.max_grad_norm,
    )
    # the same weights on every rank so far; from here on each rank draws its own dropout
    seed_everything(options.seed + world.rank)
    core = _core(resolved, context, engine, feed.evals)
    comparison.attach(resolved, engine, own)
    del own
    known = _reference_known(core, feed, pace)
    pad_id = core.tokenizer.pad_token_id
    return Training(
        core=core,
        train=feed.reader(
            world,
            core.ahead,
            pace.total_steps,
            flat=model.flat,
            pad_id=pad_id,
            reference=known.get("train"),
        ),
        cadence=pace,
        progress=Progress(),
        judge=_judge(arguments, engine),
        random=RandomState(),
    )


def _reference_known(core: Core, feed: Feed, pace: Cadence) -> dict[str, np.ndarray]:
    """What the reference says of all rows, where it is asked before training."""
    comparison.say_weights(core.arguments, feed.table)
    if feed.table is None or STAGES[core.arguments.finetuning.stage].samples:
        return {}
    known = comparison.known_beforehand(
        core.arguments,
        core.engine,
        core.context.prepared,
        {"train": core.rows(feed.table), **core.evals},
        model_dir=core.context.model_dir,
        ahead=core.ahead,
        sees_rows_again=pace.total_steps * core.context.num_sharing > feed.steps_per_epoch,
    )
    core.evals |= comparison.with_known(core.evals, known)
    return known


def assemble_evaluation(arguments: RunArguments, context: Context) -> Core:
    """The parts of a run that does not train; adapters are merged into the model."""
    seed_everything(arguments.training.seed)
    numbers = precision.choose_for_evaluation(arguments, context.world.device)
    resolved = _resolved(arguments, numbers, recomputes=False)
    loaded = load.load_model(
        context.model_dir,
        resolved.model,
        dtype=numbers.load_dtype,
        device=context.world.device,
        gradient_checkpointing=False,
        cutoff_len=resolved.data.cutoff_len,
    )
    scores = STAGES[arguments.finetuning.stage].scores
    head = value_head.require(resolved, context.model_dir, loaded) if scores else None
    own = comparison.load_own(resolved, context.model_dir, numbers.load_dtype, context.world.device)
    flat = why_not_flat(loaded) is None and comparison.takes_flat_rows(own)
    keeps_last = comparison.uses_reference(resolved) and own is None
    tuned = tuning.apply(loaded, resolved, is_trainable=False, upcast=False, keeps_last=keeps_last)
    _adjust(tuned, resolved)
    engine = Engine.for_evaluation(
        TokenModel(tuned, flat=flat, value_head=head, only_scores=scores),
        world=context.world,
        precision=numbers,
    )
    comparison.attach_to_evaluation(resolved, engine, own)
    assert isinstance(context.prepared, PreparedRef), "a stream is trained on"
    return _core(resolved, context, engine, prepared.open(context.prepared).eval)


def reading_ahead(arguments: RunArguments, device: torch.device) -> Ahead:
    """How reading runs ahead on a device; memory is pinned for the copies to a GPU alone."""
    options = arguments.training
    return Ahead(
        num_threads=options.dataloader_num_workers,
        each=options.dataloader_prefetch_factor or 2,
        pins=options.dataloader_pin_memory and device.type == "cuda",
    )


def _resolved(
    arguments: RunArguments, numbers: precision.Precision, *, recomputes: bool
) -> RunArguments:
    return replace(
        arguments,
        **numbers.keys(),
        disable_gradient_checkpointing=not recomputes,
        use_ray=arguments.ray_enabled,
    )


def _core(
    arguments: RunArguments, context: Context, engine: Engine, evals: Mapping[str, Table]
) -> Core:
    core = Core(
        arguments=arguments,
        context=context,
        engine=engine,
        tokenizer=load_tokenizer(context.model_dir, arguments.model, arguments.data.template),
        evals={},
        objective=STAGES[arguments.finetuning.stage].objective(arguments),
    )
    embedding.require_room(causal_lm(engine.model.model), core.tokenizer)
    core.evals |= {name: core.rows(samples) for name, samples in evals.items()}
    return core


def _judge(arguments: RunArguments, engine: Engine) -> Judge:
    """What looks at the evaluations of this run, as far as its keys ask for it."""
    if not compares_evaluations(arguments):
        return Judge()
    metric, greater = best_metric(arguments)
    best = Best(metric, greater_is_better=greater)
    patience = arguments.finetuning.early_stopping_steps
    threshold = arguments.finetuning.early_stopping_threshold
    early = None if patience is None else EarlyStopping(best, patience, threshold)
    return Judge(best, early, engine.schedule)


def _token_model(
    arguments: RunArguments, context: Context, numbers: precision.Precision, *, flat: bool
) -> TokenModel:
    """The model on its device, tuned as asked for; equal on all ranks."""
    keeps_float32 = _trains_own_weights(arguments)
    leaves_weights = arguments.finetuning.finetuning_type == "lora"
    loaded = load.load_model(
        context.model_dir,
        arguments.model,
        # what trains in float32 is read in float32: a copy in fewer bits would lose some
        dtype=torch.float32 if keeps_float32 else numbers.load_dtype,
        device=context.world.device,
        gradient_checkpointing=not arguments.model.disable_gradient_checkpointing,
        cutoff_len=arguments.data.cutoff_len,
        is_shared=leaves_weights and context.num_sharing > 1,
    )
    reason = why_not_flat(loaded)
    if reason is not None:
        log.info("batches are padded, not flat: %s", reason)
    stage = STAGES[arguments.finetuning.stage]
    scores = stage.scores
    has_values = stage.samples and arguments.rlhf.advantage_estimator == "gae"
    head = _value_head(arguments, context, loaded) if scores or has_values else None
    tuned = tuning.apply(loaded, arguments, is_trainable=True, upcast=not numbers.pure)
    if head is not None:
        value_head.freeze_output_head(tuned)
        # rewards are compared, so its gradient is rounding, of which Adam would make whole steps
        head.summary.bias.requires_grad_(False)
    if keeps_float32:
        for parameter in tuned.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(numbers.load_dtype)
    _adjust(tuned, arguments)
    flat = flat and reason is None
    return TokenModel(
        tuned,
        flat=flat,
        temperature=temperature(arguments),
        value_head=head,
        only_scores=scores,
    )


def _value_head(
    arguments: RunArguments, context: Context, loaded: PreTrainedModel
) -> value_head.ValueHead:
    """The value head that trains on, or a new one."""
    found = value_head.find(arguments, context.model_dir, loaded)
    is_critic = arguments.finetuning.stage == "ppo"
    return found or value_head.create(loaded, None if is_critic else arguments.training.seed)


def _adjust(tuned: nn.Module, arguments: RunArguments) -> None:
    """What single keys change in a model whose adapters are in place."""
    settings = arguments.model
    if settings.upcast_layernorm:
        upcast.upcast_norms(tuned)
    if settings.upcast_lmhead_output:
        upcast.upcast_logits(tuned)
    if settings.moe_aux_loss_coef is not None:
        set_balance(tuned, settings.moe_aux_loss_coef)


def _trains_own_weights(arguments: RunArguments) -> bool:
    """Whether weights of the model itself train, in float32."""
    finetuning = arguments.finetuning
    return finetuning.finetuning_type != "lora" and not finetuning.pure_bf16


def _needs_checkpointing(
    arguments: RunArguments, context: Context, lengths: np.ndarray, precision_name: str
) -> bool:
    """What the user said; else whether the run would not fit otherwise, on any of the ranks."""
    world = context.world
    [least] = world.max([-device_memory.free_bytes(world.device)])
    rewards = reward_files.bytes_here(arguments, context.model_dir, world.device, context.rewards)
    room = Room(int(-least), precision_name, world.device.type, world.world_size, rewards)
    return choose_recomputation(arguments, context.model_dir, lengths.tolist(), room)
