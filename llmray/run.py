"""One run on this rank: training, evaluation, artefacts. The entry of every worker.

`run` does the work for whoever built its `Context`: this process alone, torchrun (`local`), or a
Ray Train worker (`orchestration.train_job`).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from llmray import reinforcement
from llmray.arguments import environment
from llmray.arguments.run import RunArguments
from llmray.assembly import Context, Core, Training, assemble, assemble_evaluation
from llmray.data import prepared
from llmray.data.prepared import PreparedRef
from llmray.data.streaming import Stream
from llmray.errors import CheckpointError
from llmray.evaluation import draw_ranking, evaluate_rows, predict_rows
from llmray.model import tuning
from llmray.train import checkpoint, device_memory
from llmray.train.artefacts import Artefacts
from llmray.train.loop import Loop, Outcome, Progress, StepResult, fit
from llmray.train.losses import LearningObjective
from llmray.train.observers import JsonLines, Observer
from llmray.train.parallel import set_npu_mode
from llmray.train.plots import Plots
from llmray.train.random_state import make_deterministic
from llmray.train.reading import Work
from llmray.train.stages import STAGES
from llmray.train.summary import Phases, Summary, cost_of, device_name, peak_flops
from llmray.train.supervised import SupervisedStep
from llmray.train.trackers import Trackers, choose

__all__ = ["Context", "RunResult", "run"]

log = getLogger("llmray")


@dataclass(frozen=True)
class RunResult:
    """What a run came to: figures of all_results.json, and why it stopped early, if it did."""

    metrics: dict[str, float]
    stopped: str | None
    steps: int


def run(arguments: RunArguments, context: Context) -> RunResult:
    """Do what `arguments` say: train, from the newest checkpoint if there is one, and evaluate.

    Raises:
        LlmrayError: with one message for the user, whatever was wrong.
    """
    started = time.perf_counter()
    _tune_allocator()
    set_npu_mode(os.environ)
    if arguments.training.full_determinism:
        make_deterministic()
    files = Artefacts(context.run_dir, is_main=context.world.is_main)
    quarantines = arguments.data.bad_rows == "quarantine"
    if quarantines and context.world.is_main and isinstance(context.prepared, PreparedRef):
        files.write_text(prepared.BAD_ROWS, prepared.bad_rows(context.prepared))
    if arguments.training.do_train:
        result = _train(arguments, context, files, started)
    else:
        result = _evaluate_alone(arguments, context, files, started)
    files.publish()
    context.world.barrier()
    return result


def _train(
    arguments: RunArguments, context: Context, files: Artefacts, started: float
) -> RunResult:
    if arguments.training.save_only_model:
        log.warning(
            "save_only_model: true keeps no optimizer or position: a failure starts at step 0"
        )
    training = assemble(arguments, context)
    with ExitStack() as stack:
        return _trained(training, files, started, _do_step(training, files, stack))


def _do_step(training: Training, files: Artefacts, stack: ExitStack) -> Callable[[int], StepResult]:
    """What a step of the run's stage does; what it opens is closed by `stack`."""
    core = training.core
    if STAGES[core.arguments.finetuning.stage].samples:
        return stack.enter_context(closing(reinforcement.prepare(training, files.directory)))
    return SupervisedStep(
        core.engine,
        training.train,
        core.objective,
        core.arguments.training.torch_empty_cache_steps,
    )


def _trained(
    training: Training,
    files: Artefacts,
    started: float,
    do_step: Callable[[int], StepResult],
) -> RunResult:
    core = training.core
    arguments, context = core.arguments, core.context
    if context.world.is_main:
        model = core.engine.model
        files.write_json("trainable_parameters.json", tuning.status(model.model, model.value_head))
    first_step = _resume(training)
    if training.cadence.evaluates_first:
        core.engine.begin()  # what is evaluated is what the first update changes
    _put_bad_rows_aside(training, files, is_resumed=first_step > 0)
    start = time.perf_counter() - started
    observers = _observers(core, files) if context.world.is_main else ()
    for observer in observers:
        observer.on_start(first_step, training.cadence.total_steps)
    with closing(training.train):
        outcome = fit(
            Loop(
                cadence=training.cadence,
                world=context.world,
                progress=training.progress,
                do_step=do_step,
                evaluate=(lambda: evaluate_rows(core)) if core.evals else None,
                judge=training.judge,
                save=lambda step: _save(training, files, step),
                stop=context.stop,
                observers=observers,
                report=context.report,
                figures=_figures(core),
                described=core.objective.described,
            )
        )
    if outcome.finished is not None:
        log.info("stopped early after step %d: %s", training.progress.step, outcome.finished)
    metrics = _finish(training, outcome, files, start, time.perf_counter() - started)
    stopped = outcome.stopped
    if stopped is None:
        draw_ranking(core, files)
    if stopped is None and arguments.training.do_predict:
        stopped = predict_rows(core, files, metrics)
    for observer in observers:
        observer.on_end(metrics)
    return RunResult(metrics, stopped, training.progress.step)


def _evaluate_alone(
    arguments: RunArguments, context: Context, files: Artefacts, started: float
) -> RunResult:
    """A run without training: its results go beside those of an earlier training."""
    core = assemble_evaluation(arguments, context)
    observers = context.observers if context.world.is_main else ()
    for observer in observers:
        observer.on_start(0, 0)
    metrics: dict[str, float] = files.read_json("all_results.json")
    if arguments.training.do_eval:
        evals = evaluate_rows(core)
        metrics |= evals
        if context.world.is_main:
            files.write_json("eval_results.json", evals)
            files.write_json("all_results.json", metrics)
        log.info(
            "evaluated %d rows in %.1f s: %s",
            sum(len(rows.table) for rows in core.evals.values()),
            time.perf_counter() - started,
            ", ".join(f"{name} {value:.6g}" for name, value in evals.items()),
        )
    draw_ranking(core, files)
    stopped = predict_rows(core, files, metrics) if arguments.training.do_predict else None
    for observer in observers:
        observer.on_end(metrics)
    return RunResult(metrics, stopped, 0)


def _put_bad_rows_aside(training: Training, files: Artefacts, *, is_resumed: bool) -> None:
    """Name the file of a stream's bad rows, of which rank 0 alone has one."""
    batches, is_main = training.train.batches, training.core.context.world.is_main
    if isinstance(batches, Stream) and batches.quarantine is not None:
        path = files.directory / prepared.BAD_ROWS if is_main else None
        batches.quarantine.open(path, keeps=is_resumed)


def _resume(training: Training) -> int:
    """Load the checkpoint from which this attempt starts, if any; returns its step."""
    context, options = training.core.context, training.core.arguments.training
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
    training.core.engine.load_state_dict(state["engine"])
    training.progress.load_state_dict(state["progress"])
    training.train.batches.load_state_dict(state["batches"])
    training.judge.load_state_dict(state["judge"])
    if isinstance(training.core.objective, LearningObjective):
        training.core.objective.load_state_dict(state["objective"])
    for name, resumable in training.resumables.items():
        resumable.load_state_dict(state[name])
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


def _figures(core: Core) -> Callable[[Progress], dict[str, float]]:
    """What keys and RECORD_VRAM add to a log line."""
    counted = core.arguments.training.include_num_input_tokens_seen
    records = environment.flag(os.environ, "RECORD_VRAM")
    device = core.context.world.device
    if records and device.type == "cpu":
        log.info("RECORD_VRAM: the CPU has no memory of its own: 0 is recorded")

    def figures(progress: Progress) -> dict[str, float]:
        found: dict[str, float] = {}
        if counted != "no":
            is_all = counted == "all"
            found["num_input_tokens_seen"] = (
                progress.num_positions if is_all else progress.num_tokens
            )
        if records:
            allocated, reserved = device_memory.peak_bytes(device)
            on_device = device.type != "cpu"
            found["vram_allocated"] = round(allocated / 2**30, 2) if on_device else 0.0
            found["vram_reserved"] = round(reserved / 2**30, 2) if on_device else 0.0
        return found

    return figures


def _save(training: Training, files: Artefacts, step: int) -> str:
    core, options = training.core, training.core.arguments.training
    files.publish()

    replicated = {
        "engine": core.engine.state_dict(),
        "progress": training.progress.state_dict(),
        "batches": training.train.batches.state_dict(),
        "judge": training.judge.state_dict(),
    }
    if isinstance(core.objective, LearningObjective):
        replicated["objective"] = core.objective.state_dict()
    replicated |= {name: each.state_dict() for name, each in training.resumables.items()}
    return checkpoint.save(
        core.context.run_dir,
        step,
        world=core.context.world,
        replicated={} if options.save_only_model else replicated,
        per_rank={} if options.save_only_model else {"random": training.random.state_dict()},
        write_files=training.write_files,
        fingerprint=training.fingerprint(),
        keep=options.save_total_limit,
        spare=training.judge.saved_step,
    )


def _restore_best(training: Training) -> dict[str, float]:
    """Put the weights of the best saved evaluation back; returns its metrics."""
    best, core = training.judge.best, training.core
    assert best is not None, "load_best_model_at_end compares evaluations"
    if best.saved_step is None:
        log.warning(
            "load_best_model_at_end: no evaluation of this run gave a number for %s and was saved: "
            "the last weights remain",
            best.metric,
        )
        return {}
    if best.step != best.saved_step:
        log.warning(
            "the best %s was after step %s, which was not saved; the best that was is after step "
            "%d. Write save_steps equal to eval_steps to save all that are evaluated",
            best.metric,
            best.step,
            best.saved_step,
        )
    if best.saved_step != training.progress.step:
        core.engine.load_trainable(
            checkpoint.load_part(core.context.run_dir, best.saved_step, "engine", "trainable")
        )
    log.info(
        "ending with the weights after step %d, the best: %s %.6g",
        best.saved_step,
        best.metric,
        best.saved_metrics[best.metric],
    )
    return best.saved_metrics


def _finish(
    training: Training, outcome: Outcome, files: Artefacts, start: float, seconds: float
) -> dict[str, float]:
    """Evaluate where that is still to be done, and write weights and results; all ranks call it."""
    core, progress, options = training.core, training.progress, training.core.arguments.training
    evals = dict(outcome.metrics)
    if options.load_best_model_at_end and outcome.stopped is None:
        evals = _restore_best(training) or evals
    if core.evals and options.do_eval and not evals and outcome.stopped is None:
        began = time.perf_counter()
        evals = evaluate_rows(core)
        progress.evaluation_seconds += time.perf_counter() - began
    train = _train_figures(training, seconds)
    told = _summary(training, start)
    metrics = {**train, **told.metrics(), **evals}
    if core.context.world.is_main:
        files.write_files(training.write_files)
        files.write_json("train_results.json", train)
        if evals:
            files.write_json("eval_results.json", {"epoch": train["epoch"], **evals})
        files.write_json("all_results.json", metrics)
    for line in told.lines():
        log.info("%s", line)
    return metrics


def _train_figures(training: Training, seconds: float) -> dict[str, float]:
    """What train_results.json holds; `seconds` are those of this attempt."""
    progress = training.progress
    steps, spent = max(1, progress.step), max(progress.seconds, 1e-9)
    epoch = round(progress.step / training.cadence.steps_per_epoch, 6)
    figures = {
        "epoch": epoch,
        "train_loss": (progress.total_loss + progress.loss_sum) / steps,
        "train_runtime": round(seconds, 3),
        "train_samples_per_second": round(epoch * training.train.num_rows / spent, 3),
        "train_steps_per_second": round(progress.step / spent, 4),
        "train_tokens": progress.num_tokens,
        "train_tokens_per_second": round(progress.num_tokens / spent, 1),
    }
    if training.core.arguments.finetuning.include_effective_tokens_per_second:
        num_workers = training.core.context.world.world_size
        figures["effective_tokens_per_sec"] = round(progress.num_tokens / spent / num_workers, 1)
    return figures


def _summary(training: Training, start: float) -> Summary:
    """The figures of the run so far, over all its attempts but for its start; a collective call."""
    core, progress = training.core, training.progress
    world, name = core.context.world, device_name(core.context.world.device)
    allocated, _ = device_memory.peak_bytes(world.device)
    [most] = world.max([float(allocated)])
    predicted = 0 if core.ranks else progress.num_targets  # tokens for which logits are computed
    work = Work(progress.num_tokens, predicted, progress.num_squares)
    return Summary(
        tokens=progress.num_tokens,
        steps=progress.step,
        world_size=world.world_size,
        phases=Phases(
            start=start,
            data=progress.data_seconds,
            training=progress.seconds - progress.data_seconds,
            evaluation=progress.evaluation_seconds,
            saving=progress.saving_seconds,
        ),
        flops=cost_of(core.engine.model.model).of(work),
        peak_flops=peak_flops(name, core.engine.precision.name),
        device=name,
        peak_bytes=int(most),
    )


def _observers(core: Core, files: Artefacts) -> tuple[Observer, ...]:
    plot_loss = core.arguments.finetuning.plot_loss
    keys = plot_loss if isinstance(plot_loss, tuple) else ()
    plots = (Plots(files.directory, keys),) if plot_loss else ()
    trackers: tuple[Observer, ...] = ()
    if choose(core.arguments.tracking, os.environ).names:
        group = core.context.group
        trackers = (Trackers(core.arguments, files.directory, os.environ, group),)
    return (JsonLines(files.directory), *plots, *trackers, *core.context.observers)


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
