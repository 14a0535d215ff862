"""Which evaluation is the best of a run: the metric that says so, and what may be named as one."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from llmray.arguments.problems import Problem, given

if TYPE_CHECKING:
    from llmray.arguments.method_rules import Rule
    from llmray.arguments.run import RunArguments


SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact_match")  # of generated responses

# of stage ppo, whose evaluations have no loss
ANSWERING = ("score", "score_deviation", "kl", "response_length", "without_eos")

RANKING = ("accuracy", "margin", "reward_chosen", "reward_rejected")  # of stage rm


def compares_evaluations(arguments: RunArguments) -> bool:
    """Whether something in the run follows from which evaluation is the best."""
    training = arguments.training
    return (
        training.load_best_model_at_end
        or training.save_strategy == "best"
        or training.metric_for_best_model is not None
        or arguments.finetuning.early_stopping_steps is not None
        or arguments.optimizer.lr_scheduler_type == "reduce_lr_on_plateau"
    )


def best_metric(arguments: RunArguments) -> tuple[str, bool]:
    """The metric by which evaluations are compared, and whether a greater one is better.

    As transformers takes it: `eval_` may be left out, and a name that ends with `loss` is better
    when it is smaller, unless greater_is_better says otherwise. Of stage ppo, which has no loss
    of the rows, it is the score.
    """
    training = arguments.training
    usual = "score" if arguments.finetuning.stage == "ppo" else "loss"
    name = training.metric_for_best_model or usual
    name = name if name.startswith("eval_") else f"eval_{name}"
    greater = training.greater_is_better
    return name, not name.endswith("loss") if greater is None else greater


def evaluation_metrics(arguments: RunArguments) -> tuple[str, ...]:
    """The metrics of an evaluation of this run that say how good the model is."""
    kinds = list(ANSWERING) if arguments.finetuning.stage == "ppo" else ["loss"]
    if arguments.finetuning.stage == "rm":
        kinds += RANKING
    elif arguments.finetuning.compute_accuracy:
        kinds.append("accuracy")
    if arguments.training.predict_with_generate:
        kinds += SCORES
    kinds += _preference_metrics(arguments)
    prefixes = ["eval"]
    if arguments.data.eval_on_each_dataset:
        prefixes += [f"eval_{name}" for name in arguments.data.eval_dataset]
    # responses are scored set by set, and not once more together
    return tuple(
        f"{prefix}_{kind}"
        for prefix in prefixes
        for kind in kinds
        if len(prefixes) == 1 or prefix != "eval" or kind not in SCORES
    )


def _preference_metrics(arguments: RunArguments) -> list[str]:
    """What stages dpo and kto log beside the loss."""
    stage, loss = arguments.finetuning.stage, arguments.rlhf.pref_loss
    if stage not in ("dpo", "kto"):
        return []
    found = [f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")]
    found += ["rewards/margins"]
    found += ["rewards/accuracies"] if stage == "dpo" else []
    has_reference = stage == "kto" or loss not in ("orpo", "simpo")
    return [*found, "kl", "chosen_falls"] if has_reference else found


def best_metric_is_logged(arguments: RunArguments) -> Iterator[Problem]:
    """The metric that says which evaluation is best is one that evaluations log."""
    training = arguments.training
    name, _ = best_metric(arguments)
    logged = evaluation_metrics(arguments)
    if training.metric_for_best_model is None or name in logged:
        return
    close = get_close_matches(name, logged, n=1, cutoff=0.7)
    advice = f"Write {close[0]}." if close else "Write one of these."
    if name == "eval_accuracy":
        advice = "Write compute_accuracy: true to have it."
    yield Problem(
        ("metric_for_best_model",),
        f"{given('metric_for_best_model', training.metric_for_best_model)} is never logged: "
        f"evaluations of this run log {', '.join(logged)}. {advice}",
    )


def best_needs_evaluations(arguments: RunArguments) -> Iterator[Problem]:
    """Stopping early and the best checkpoint are decided at evaluations."""
    training = arguments.training
    asked = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "early_stopping_steps": arguments.finetuning.early_stopping_steps is not None,
        "save_strategy": training.save_strategy == "best",
        "metric_for_best_model": training.metric_for_best_model is not None,
        "lr_scheduler_type": arguments.optimizer.lr_scheduler_type == "reduce_lr_on_plateau",
    }
    for key, is_asked in asked.items():
        if is_asked and training.eval_strategy == "no":
            value = given(key, arguments.flat()[key])
            yield Problem(
                (key, "eval_strategy"),
                f"{value} decides by evaluations, but eval_strategy=no. Write eval_strategy: steps "
                f"and eval_steps, or remove {key}.",
            )


def best_is_saved(arguments: RunArguments) -> Iterator[Problem]:
    """The best evaluation can only be restored where it was saved."""
    training = arguments.training
    if training.load_best_model_at_end and training.save_strategy not in (
        training.eval_strategy,
        "best",
    ):
        yield Problem(
            ("load_best_model_at_end", "save_strategy", "eval_strategy"),
            f"load_best_model_at_end=true with save_strategy={training.save_strategy} and "
            f"eval_strategy={training.eval_strategy}: what is evaluated must be saved. Write the "
            "same for both.",
        )


def best_is_saved_when_evaluated(arguments: RunArguments) -> Iterator[Problem]:
    """Where the best is restored, every checkpoint stands at an evaluation."""
    training = arguments.training
    by_steps = training.save_strategy == training.eval_strategy == "steps"
    saves, evals = training.save_steps, training.eval_steps or training.logging_steps
    if not (training.load_best_model_at_end and by_steps):
        return
    times = saves / evals
    if abs(times - round(times)) > 1e-9 or times < 1:
        yield Problem(
            ("load_best_model_at_end", "save_steps", "eval_steps"),
            f"load_best_model_at_end=true with save_steps={saves} and eval_steps={evals}: a "
            "checkpoint between two evaluations cannot be the best. Write a multiple of "
            "eval_steps as save_steps.",
        )


def delta_has_patience(arguments: RunArguments) -> Iterator[Problem]:
    """The least difference that counts as better is for stopping early."""
    finetuning = arguments.finetuning
    if finetuning.early_stopping_threshold and finetuning.early_stopping_steps is None:
        yield Problem(
            ("early_stopping_threshold", "early_stopping_steps"),
            f"early_stopping_threshold={finetuning.early_stopping_threshold} without "
            "early_stopping_steps: nothing stops early. Write early_stopping_steps, or remove it.",
        )


def sets_are_named(arguments: RunArguments) -> Iterator[Problem]:
    """Sets are evaluated by name where they are named."""
    data = arguments.data
    if data.eval_on_each_dataset and not data.eval_dataset:
        yield Problem(
            ("eval_on_each_dataset", "eval_dataset"),
            "eval_on_each_dataset=true, but no eval_dataset is given: rows that val_size sets "
            "aside are one set. Write eval_dataset, or remove eval_on_each_dataset.",
        )


BEST_RULES: tuple[Rule, ...] = (
    best_metric_is_logged,
    best_needs_evaluations,
    best_is_saved,
    best_is_saved_when_evaluated,
    delta_has_patience,
    sets_are_named,
)
