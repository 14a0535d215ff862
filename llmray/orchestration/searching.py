"""Where more trials come from while a sweep runs: nowhere, or from optuna, which learns.

Those of a grid or a random search are `Listed` at the start; `Asked` asks optuna for one when a
place is free, and tells it what became of each. What was tried before a restart is told again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from llmray.arguments.space import VARIANT, Distribution, rounded
from llmray.errors import ArgumentsError

if TYPE_CHECKING:
    from llmray.arguments.tune import Sweep
    from llmray.orchestration.ledger import Entry

Values = dict[str, Any]


class Searcher(Protocol):
    """What a sweep asks for values."""

    def next(self) -> Values | None:
        """The values of one more trial; None where there are to be no more."""

    def tell(self, entry: Entry) -> None:
        """What became of a trial."""


class Listed:
    """All trials were known beforehand."""

    def next(self) -> Values | None:
        """No more."""
        return None

    def tell(self, entry: Entry) -> None:
        """Nothing follows from it."""


class Asked:
    """optuna's sampler (its default, TPE), by ask and tell.

    Args:
        sweep: its space, and how trials compare.
        before: trials of the sweep before a restart, by their number; those that are not over are
            asked for again with the same values.

    Raises:
        ArgumentsError: optuna is not installed.
    """

    def __init__(self, sweep: Sweep, before: Iterable[Entry] = ()) -> None:
        optuna = require_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._sweep = optuna, sweep
        self._trials: dict[int, Any] = {}
        self._study = optuna.create_study(
            direction="minimize" if sweep.mode == "min" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=sweep.seed),
        )
        for entry in sorted(before, key=lambda entry: entry.number):
            self._study.enqueue_trial(_as_suggested(sweep, entry.values))
            self._ask()
            if entry.is_over:
                self.tell(entry)

    def next(self) -> Values | None:
        """What optuna proposes, up to num_samples trials."""
        if len(self._trials) >= self._sweep.num_samples:
            return None
        return self._ask()

    def tell(self, entry: Entry) -> None:
        """Its metric; for one that was stopped early also what it reported on the way."""
        trial, states = self._trials[entry.number], self._optuna.trial.TrialState
        if entry.metric is None or not math.isfinite(entry.metric):
            self._study.tell(trial, state=states.FAIL)
            return
        if entry.state == "stopped":
            for report in entry.reports:
                trial.report(report.value, report.step)
            self._study.tell(trial, state=states.PRUNED)
            return
        self._study.tell(trial, entry.metric)

    def _ask(self) -> Values:
        trial = self._study.ask()
        self._trials[len(self._trials) + 1] = trial
        return self._sweep.space.assemble(lambda key, found: _suggest(trial, key, found))


def _suggest(trial: Any, key: str, found: Distribution) -> Any:
    """A value of optuna's; of values that can be counted it chooses the number of one."""
    if found.is_list:
        return found.values[trial.suggest_categorical(key, range(len(found.values)))]
    points = found.points()
    if points is not None:
        return points[trial.suggest_int(key, 0, len(points) - 1)]
    drawn = trial.suggest_float(key, found.low, found.high, log=found.kind == "loguniform")
    return min(max(rounded(drawn), found.low), found.high)


def _as_suggested(sweep: Sweep, values: Values) -> dict[str, Any]:
    """What `_suggest` asked for when a trial got these values."""
    suggested: dict[str, Any] = {}

    def note(key: str, found: Distribution) -> Any:
        if key == VARIANT:
            wanted = [n for n, v in enumerate(sweep.space.variants) if v.items() <= values.items()]
            value = max(wanted, key=lambda number: len(sweep.space.variants[number]))
        else:
            value = values[key]
        points = found.values if found.is_list else found.points()
        suggested[key] = value if points is None else list(points).index(value)
        return value

    sweep.space.assemble(note)
    return suggested


def require_optuna() -> Any:
    """The package optuna.

    Raises:
        ArgumentsError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ArgumentsError(
            "searcher=optuna needs the package optuna, which is not installed: pip install "
            "'llmray[optuna]'; or write searcher: random."
        ) from error
    return optuna
