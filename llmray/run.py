"""One training run on this rank: model, data, engine, loop, artefacts. The entry of every worker.

`run` does the work for whoever built its `Context`: this process alone, torchrun (`local`), or a
Ray Train worker (`orchestration.train_job`).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from llmray import hub
from llmray.arguments.run import RunArguments
from llmray.data import prepared
from llmray.data.batches import Batches
from llmray.data.tokenizer import load_tokenizer
from llmray.errors import CheckpointError
from llmray.model import export, load, memory, tuning
from llmray.model.attention import why_not_flat
from llmray.model.head import TokenModel
from llmray.train import checkpoint, optimizers, precision, predict, schedules
from llmray.train.artefacts import Artefacts
from llmray.train.engine import Engine
from llmray.train.evaluate import evaluate
from llmray.train.generate import Sampling
from llmray.train.loop import Cadence, Loop, Outcome, Progress, cadence, fit
from llmray.train.losses import Objective
from llmray.train.observers import JsonLines, Observer
from llmray.train.parallel import World, set_npu_mode
from llmray.train.plots import Plots
from llmray.train.random_state import RandomState, make_deterministic, seed_everything
from llmray.train.stages import STAGES
from llmray.train.supervised import Rows, SupervisedStep
from llmray.train.trackers import Trackers, choose

log = getLogger("llmray")


@dataclass
class Context:
    """What a run is given from outside.

    `stop` is asked by rank 0 at step borders and gives a reason to stop, or None. `report` is
    called by all ranks at saves and evaluations with metrics and the checkpoint's path.
    """

    world: World
    run_dir: str  # checkpoints, logs and final artefacts; a local path or a URI
    prepared: prepared.PreparedRef
    model_dir: Path
    stop: Callable[[], str | None]
    observers: tuple[Observer, ...] = ()
    report: Callable[[dict[str, float], str | None], None] | None = None
    attempt: int = 1  # above 1: workers were lost, and this goes on from their last checkpoint


@dataclass(frozen=True)
class RunResult:
    """What a run came to: figures of all_results.json, and why it stopped early, if it did."""

    metrics: dict[str, float]
    stopped: str | None
    steps: int


@dataclass
class _Training:
    """The assembled parts of a run, and what a checkpoint of it holds.

    `arguments` hold every choice that was left open as it was made.
    """

    arguments: RunArguments
    context: Context
    engine: Engine
    tokenizer: Any
    train: Rows
    evals: dict[str, Rows]
    batches: Batches
    objective: Objective
    cadence: Cadence
    progress: Progress
    random: RandomState

    def write_files(self, directory: Path) -> None:
        """Write what users take from a run: weights, tokenizer, the run file."""
        whole = self.arguments.finetuning.finetuning_type != "lora"
        dtype = self.engine.precision.load_dtype if whole else None
        export.write_weights(self.engine.model.model, directory, self.tokenizer, dtype=dtype)
        self.arguments.save(directory / "run_arguments.yaml")

    def predictor(self, stop: Callable[[], str | None]) -> predict.Predictor:
        """What generates responses to the evaluation rows."""
        arguments = self.arguments
        return predict.Predictor(
            self.engine,
            self.tokenizer,
            Sampling.for_evaluation(arguments, self.engine.model.model, self.tokenizer),
            per_device=arguments.training.per_device_eval_batch_size,
            seed=arguments.training.seed,
            skips_special=arguments.generating.skip_special_tokens,
            stop=stop,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a resume compares: `identity` must be equal, `arguments` are only reported."""
        context, arguments = self.context, self.arguments
        identity = {
            "model": hub.identity(context.model_dir),
            "data": context.prepared.key,
            "stage": arguments.finetuning.stage,
            "finetuning_type": arguments.finetuning.finetuning_type,
        }
        return {"identity": identity, "arguments": arguments.flat()}


def run(arguments: RunArguments, context: Context) -> RunResult:
    """Train as `arguments` say, from the newest checkpoint of the run directory if there is one.

    Raises:
        LlmrayError: with one message for the user, whatever was wrong.
    """
    started = time.perf_counter()
    _tune_allocator()
    set_npu_mode(os.environ)
    if arguments.training.full_determinism:
        make_deterministic()
    files = Artefacts(context.run_dir, is_main=context.world.is_main)
    if arguments.training.save_only_model:
        log.warning(
            "save_only_model: true keeps no optimizer or position: a failure starts at step 0"
        )
    training = _assemble(arguments, context)
    first_step = _resume(training)
    observers = _observers(training, files) if context.world.is_main else ()
    for observer in observers:
        observer.on_start(first_step, training.cadence.total_steps)
    outcome = fit(
        Loop(
            cadence=training.cadence,
            world=context.world,
            progress=training.progress,
            do_step=SupervisedStep(
                training.engine, training.train, training.batches, training.objective
            ),
            evaluate=(lambda: _observed(training)) if training.evals else None,
            save=lambda step: _save(training, files, step),
            stop=context.stop,
            observers=observers,
            report=context.report,
        )
    )
    metrics = _finish(training, outcome, files, time.perf_counter() - started)
    stopped = outcome.stopped
    if stopped is None and arguments.training.do_predict:
        stopped = _predict(training, files, metrics)
    for observer in observers:
        observer.on_end(metrics)
    files.publish()
    context.world.barrier()
    return RunResult(metrics, stopped, training.progress.step)


def _assemble(arguments: RunArguments, context: Context) -> _Training:
    world, finetuning, options = context.world, arguments.finetuning, arguments.training
    seed_everything(options.seed)
    numbers = precision.choose(arguments, world.device)
    table = prepared.open(context.prepared)
    tokenizer = load_tokenizer(context.model_dir, arguments.model, arguments.data.template)
    batches = Batches(
        table.train.lengths,
        options.per_device_train_batch_size,
        options.gradient_accumulation_steps,
        world.world_size,
        world.rank,
        seed=options.data_seed if options.data_seed is not None else options.seed,
        shuffle=not finetuning.disable_shuffling,
    )
    pace = cadence(options, batches.steps_per_epoch)
    recomputes = _needs_checkpointing(arguments, context, table.train.lengths)
    resolved = arguments.replace(
        **numbers.keys(),
        disable_gradient_checkpointing=not recomputes,
        use_ray=arguments.ray_enabled,
    )
    model = _token_model(resolved, context, numbers)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine = Engine(
        model,
        trainable,
        optimizers.build(model, trainable, arguments.optimizer),
        schedules.schedule(arguments.optimizer, pace.total_steps),
        world=world,
        precision=numbers,
        max_grad_norm=arguments.optimizer.max_grad_norm,
    )
    # the same weights on every rank so far; from here on each rank draws its own dropout
    seed_everything(options.seed + world.rank)

    def rows(samples: prepared.SampleTable) -> Rows:
        return Rows(samples, flat=model.flat, pad_id=tokenizer.pad_token_id)

    return _Training(
        arguments=resolved,
        context=context,
        engine=engine,
        tokenizer=tokenizer,
        train=rows(table.train),
        evals={name: rows(samples) for name, samples in table.eval.items()},
        batches=batches,
        objective=STAGES[finetuning.stage].objective(),
        cadence=pace,
        progress=Progress(),
        random=RandomState(),
    )


def _token_model(
    arguments: RunArguments, context: Context, numbers: precision.Precision
) -> TokenModel:
    """The model on its device, tuned as asked for; equal on all ranks."""
    keeps_float32 = _trains_own_weights(arguments)
    loaded = load.load_model(
        context.model_dir,
        arguments.model,
        # what trains in float32 is read in float32: a copy in fewer bits would lose some
        dtype=torch.float32 if keeps_float32 else numbers.load_dtype,
        device=context.world.device,
        gradient_checkpointing=not arguments.model.disable_gradient_checkpointing,
    )
    reason = why_not_flat(loaded)
    if reason is not None:
        log.info("batches are padded, not flat: %s", reason)
    tuned = tuning.apply(loaded, arguments, is_trainable=True, upcast=not numbers.pure)
    if keeps_float32:
        for parameter in tuned.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(numbers.load_dtype)
    return TokenModel(tuned, flat=reason is None)


def _trains_own_weights(arguments: RunArguments) -> bool:
    """Whether weights of the model itself train, in float32."""
    finetuning = arguments.finetuning
    return finetuning.finetuning_type != "lora" and not finetuning.pure_bf16


def _needs_checkpointing(arguments: RunArguments, context: Context, lengths: Any) -> bool:
    """What the user said; else whether one micro-batch would fill most of the free memory."""
    said = arguments.model.disable_gradient_checkpointing
    if said is not None:
        return not said
    per_device = arguments.training.per_device_train_batch_size
    tokens = int(sum(sorted(lengths.tolist(), reverse=True)[:per_device]))
    config = load.load_config(context.model_dir, arguments.model)
    need = memory.activation_bytes(config.get_text_config(), tokens, bytes_per_value=4)
    [short] = context.world.max([need / max(1, _free_bytes(context.world.device))])
    if short > 0.5:
        log.info(
            "gradient checkpointing on: activations of %d tokens need about %.1f GB "
            "(disable_gradient_checkpointing: true turns it off)",
            tokens,
            need / 1e9,
        )
    return short > 0.5


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1 << 62


def _resume(training: _Training) -> int:
    """Load the checkpoint from which this attempt starts, if any; returns its step."""
    context, options = training.context, training.arguments.training
    ours = training.fingerprint()
    found = checkpoint.find(
        context.run_dir,
        options.resume_from_checkpoint,
        world=context.world,
        identity=ours["identity"],
    )
    if found is None:
        return 0
    _check_identity(found, ours, context.run_dir)
    total = training.cadence.total_steps
    if found.step >= total and context.attempt == 1:
        raise CheckpointError(
            f"{found.path} is at step {found.step} of {total}: 0 steps remain. To train on, raise "
            "num_train_epochs or max_steps; to train anew, set overwrite_output_dir: true."
        )
    state = checkpoint.load(found.path, rank=context.world.rank)
    training.engine.load_state_dict(state["engine"])
    training.progress.load_state_dict(state["progress"])
    training.batches.load_state_dict(state["batches"])
    if not context.world.is_main:
        # the sums since the last log were reduced to rank 0 when the checkpoint was made
        training.progress.loss_sum, training.progress.metric_sums = 0.0, {}
    if "random" in state:
        training.random.load_state_dict(state["random"])
    log.info(
        "resuming from %s: step %d of %d, %d steps remain",
        found.path,
        found.step,
        total,
        total - found.step,
    )
    for line in checkpoint.differences(found.fingerprint["arguments"], ours["arguments"]):
        log.info("differs from the checkpoint: %s", line)
    return found.step


def _check_identity(found: checkpoint.Found, ours: dict[str, Any], run_dir: str) -> None:
    theirs = found.fingerprint["identity"]
    wrong = [key for key, value in ours["identity"].items() if theirs.get(key) != value]
    if not wrong:
        return
    said = ", ".join(
        f"{key} {theirs.get(key)!r} there, {ours['identity'][key]!r} here" for key in wrong
    )
    raise CheckpointError(
        f"{found.path} belongs to another run: {said}. A resume needs the same model, data, stage "
        "and finetuning_type. To train anew, write `overwrite_output_dir: true` (what lies in "
        f"{run_dir} is moved aside), or choose another output_dir."
    )


def _evaluate(training: _Training) -> dict[str, float]:
    options = training.arguments.training
    per_device = options.per_device_eval_batch_size
    metrics = evaluate(training.engine, training.evals, training.objective, per_device)
    if not options.predict_with_generate:
        return metrics
    judged = predict.judge(training.predictor(lambda: None), training.evals, metrics)
    assert judged is not None, "nothing stops it"
    return judged.metrics


def _predict(training: _Training, files: Artefacts, metrics: dict[str, float]) -> str | None:
    """Predict the evaluation rows, add to `metrics`; returns why it was stopped, if it was."""
    options, world = training.arguments.training, training.context.world
    tables = {f"predict{name.removeprefix('eval')}": rows for name, rows in training.evals.items()}
    lines = None
    if options.predict_with_generate:
        judged = predict.judge(training.predictor(training.context.stop), tables)
        if judged is None:
            log.info("the prediction was stopped, and nothing of it is written")
            return world.broadcast(training.context.stop())
        predicted, lines = judged.metrics, predict.as_lines(judged.predictions)
    else:
        per_device = options.per_device_eval_batch_size
        predicted = evaluate(training.engine, tables, training.objective, per_device)
    metrics |= predicted
    log.info("predicted: %s", ", ".join(f"{key} {value:g}" for key, value in predicted.items()))
    if world.is_main:
        if lines is not None:
            files.write_text("generated_predictions.jsonl", lines)
        files.write_json("predict_results.json", predicted)
        files.write_json("all_results.json", metrics)
    return None


def _observed(training: _Training) -> dict[str, float]:
    """An evaluation within training, which the schedule of the learning rate sees."""
    metrics = _evaluate(training)
    training.engine.schedule.observe(metrics["eval_loss"], greater_is_better=False)
    return metrics


def _save(training: _Training, files: Artefacts, step: int) -> str:
    options = training.arguments.training
    files.publish()

    replicated = {
        "engine": training.engine.state_dict(),
        "progress": training.progress.state_dict(),
        "batches": training.batches.state_dict(),
    }
    return checkpoint.save(
        training.context.run_dir,
        step,
        world=training.context.world,
        replicated={} if options.save_only_model else replicated,
        per_rank={} if options.save_only_model else {"random": training.random.state_dict()},
        write_files=training.write_files,
        fingerprint=training.fingerprint(),
        keep=options.save_total_limit,
    )


def _finish(
    training: _Training, outcome: Outcome, files: Artefacts, seconds: float
) -> dict[str, float]:
    """Evaluate where that is still to be done, and write weights and results; all ranks call it."""
    progress, options = training.progress, training.arguments.training
    evals = dict(outcome.metrics)
    if training.evals and options.do_eval and not evals and outcome.stopped is None:
        evals = _evaluate(training)
    steps = max(1, progress.step)
    epoch = round(progress.step / training.cadence.steps_per_epoch, 6)
    rows = epoch * len(training.train.table)
    train = {
        "epoch": epoch,
        "train_loss": (progress.total_loss + progress.loss_sum) / steps,
        "train_runtime": round(seconds, 3),
        "train_samples_per_second": round(rows / max(progress.seconds, 1e-9), 3),
        "train_steps_per_second": round(progress.step / max(progress.seconds, 1e-9), 4),
        "train_tokens": progress.num_tokens,
        "train_tokens_per_second": round(progress.num_tokens / max(progress.seconds, 1e-9), 1),
    }
    metrics = {**train, **evals}
    if training.context.world.is_main:
        files.write_files(training.write_files)
        files.write_json("train_results.json", train)
        if evals:
            files.write_json("eval_results.json", {"epoch": epoch, **evals})
        files.write_json("all_results.json", metrics)
    return metrics


def _observers(training: _Training, files: Artefacts) -> tuple[Observer, ...]:
    plot_loss = training.arguments.finetuning.plot_loss
    keys = plot_loss if isinstance(plot_loss, tuple) else ()
    plots = (Plots(files.directory, keys),) if plot_loss else ()
    trackers: tuple[Observer, ...] = ()
    if choose(training.arguments.tracking, os.environ).names:
        trackers = (Trackers(training.arguments, files.directory, os.environ),)
    return (JsonLines(files.directory), *plots, *trackers, *training.context.observers)


def _tune_allocator() -> None:
    """Let glibc keep freed memory: large tensors are otherwise mapped anew at every step.

    Saves 6 % of a step on a CPU, and memory too. M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD
    of mallopt(3); other C libraries lack the call and are left alone.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 26)):
        libc.mallopt(option, ctypes.c_int(value))
