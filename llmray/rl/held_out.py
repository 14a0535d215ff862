"""Evaluation of stage ppo: scores, divergence and lengths of responses to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llmray.arguments.best import ANSWERING
from llmray.errors import RewardError
from llmray.rl import figures
from llmray.rl.advantages import KlEstimator
from llmray.rl.experience import Collector
from llmray.rl.rollout import Prompt
from llmray.train.parallel import World


def judge(
    collector: Collector,
    tables: Mapping[str, Sequence[Prompt]],
    estimator: KlEstimator,
    world: World,
) -> dict[str, float]:
    """Metrics of each table by its name, alike on all ranks; a collective call.

    Where sets are judged one by one, those of all their responses stand under `eval` too.

    The draws are the same at every evaluation, so metrics differ by the policy alone.

    Args:
        collector: samples and scores; its plan is that of evaluation.
        tables: name of a table, which becomes the metrics' prefix, to this rank's prompts of it.
        estimator: of the divergence.
        world: all ranks.

    Raises:
        RewardError: no response of a table has a score.
    """
    found: dict[str, float] = {}
    parts: list[figures.Judged] = []
    for name, prompts in tables.items():
        experience = collector.collect(prompts, 0)
        judged = figures.of_experience(experience, estimator, world)
        if not judged.num_scored:
            raise RewardError(
                f"none of the {judged.num_responses:g} responses to {name} has a score. One at "
                "least is required: see the warnings above, and mend what scores."
            )
        found |= dict(_named(name, figures.described(judged)))
        parts.append(judged)
    if parts and "eval" not in tables:
        found |= dict(_named("eval", figures.described(figures.together(parts))))
    return found


def _named(prefix: str, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for name in ANSWERING:
        yield f"{prefix}_{name}", values[name]
