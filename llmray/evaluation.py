"""Evaluation and prediction of an assembled run: within training, after it, or alone."""

from __future__ import annotations

from logging import getLogger

from llmray.assembly import Core
from llmray.train import predict, ranking
from llmray.train.artefacts import Artefacts
from llmray.train.evaluate import evaluate
from llmray.train.ranking import Pair
from llmray.train.reading import Rows

log = getLogger("llmray")


def evaluate_rows(core: Core) -> dict[str, float]:
    """The metrics of the evaluation rows, alike on all ranks; a collective call."""
    if core.judged is not None:
        return core.judged()
    metrics = _losses(core, core.evals, "eval")
    if not core.arguments.training.predict_with_generate:
        return metrics
    judged = predict.judge(core.predictor(lambda: None), core.evals, metrics)
    assert judged is not None, "nothing stops it"
    return judged.metrics


def predict_rows(core: Core, files: Artefacts, metrics: dict[str, float]) -> str | None:
    """Predict the evaluation rows, add to `metrics`; returns why it was stopped, if it was."""
    world = core.context.world
    tables = {f"predict{name.removeprefix('eval')}": rows for name, rows in core.evals.items()}
    lines = None
    if core.samples or core.arguments.training.predict_with_generate:
        judged = predict.judge(core.predictor(core.context.stop), tables)
        if judged is None:
            log.info("the prediction was stopped, and nothing of it is written")
            return world.broadcast(core.context.stop())
        predicted, lines = judged.metrics, predict.as_lines(judged.predictions)
    else:
        predicted = _losses(core, tables, "predict")
        if core.ranks:
            lines = ranking.as_lines(ranked_pairs(core, files))
    metrics |= predicted
    log.info("predicted: %s", ", ".join(f"{key} {value:g}" for key, value in predicted.items()))
    if world.is_main:
        if lines is not None:
            files.write_text("generated_predictions.jsonl", lines)
        files.write_json("predict_results.json", predicted)
        files.write_json("all_results.json", metrics)
    return None


def draw_ranking(core: Core, files: Artefacts) -> None:
    """Draw how right the rewards of the evaluation pairs are, where pictures are wanted.

    A collective call. Prediction draws them anyway.
    """
    wanted = core.arguments.finetuning.plot_loss and not core.arguments.training.do_predict
    if core.ranks and core.evals and wanted:
        ranked_pairs(core, files)


def ranked_pairs(core: Core, files: Artefacts) -> list[Pair]:
    """The rewards of all evaluation pairs; rank 0 draws how right they are. A collective call."""
    arguments = core.arguments
    per_device = arguments.training.per_device_eval_batch_size
    pairs = [
        pair
        for name, rows in core.evals.items()
        for pair in ranking.rank(core.engine, name, rows, per_device, core.ahead)
    ]
    if core.context.world.is_main:
        ranking.draw(pairs, files.directory / ranking.PICTURE)
    return pairs


def _losses(core: Core, tables: dict[str, Rows], whole: str) -> dict[str, float]:
    arguments = core.arguments
    return evaluate(
        core.engine,
        tables,
        core.objective,
        arguments.training.per_device_eval_batch_size,
        whole=whole,
        accuracy=arguments.finetuning.compute_accuracy and not core.ranks,
        ahead=core.ahead,
    )
