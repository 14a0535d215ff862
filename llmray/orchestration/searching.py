"""Where more trials come from while a sweep runs: nowhere, or from optuna, which learns.

Those of a grid or a random search are `Listed` at the start; `Asked` asks optuna for one when a
place is free, and tells it what became of each. What was tried before a restart is told again. No
trial is like another: a sampler may propose the same values twice, and does so in a small space.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from logging import getLogger
from typing import TYPE_CHECKING, Any, Protocol

from llmray.arguments.space import VARIANT, Distribution, rounded
from llmray.errors import ArgumentsError

if TYPE_CHECKING:
    from llmray.arguments.tune import Sweep
    from llmray.orchestration.ledger import Entry

log = getLogger("llmray")

Values = dict[str, Any]
ATTEMPTS = 100  # proposals, draws by chance, and points of the grid, for one new trial
SEEDS = 2**32  # of numpy's generators


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
        is_possible: whether values make a trial; ends and combinations were checked before, which
            says nothing of all that lies inside of ranges.

    Raises:
        ArgumentsError: optuna is not installed.
    """

    def __init__(
        self,
        sweep: Sweep,
        before: Iterable[Entry] = (),
        is_possible: Callable[[Values], bool] = lambda values: True,
    ) -> None:
        optuna = require_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._sweep, self._is_possible = optuna, sweep, is_possible
        self._trials: dict[int, Any] = {}
        entries = sorted(before, key=lambda entry: entry.number)
        self._seen: list[Values] = [entry.values for entry in entries]
        self._is_at_end = False
        # what is told again moves no generator: with the first seed it would draw the same again
        seed = (sweep.seed + len(entries)) % SEEDS
        self._chance = random.Random(seed)
        self._study = optuna.create_study(
            direction="minimize" if sweep.mode == "min" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        for entry in entries:
            self._take(self._ask(entry.values)[0])
            if entry.is_over:
                self.tell(entry)

    def next(self) -> Values | None:
        """What optuna proposes, up to num_samples trials; all are possible, and no two alike."""
        if self._is_at_end or len(self._trials) >= self._sweep.num_samples:
            return None
        found = self._new()
        if found is None:
            self._is_at_end = True
            log.warning(
                "searcher=optuna: no values are found that make another trial, so that there are "
                "%d of num_samples=%d",
                len(self._trials),
                self._sweep.num_samples,
            )
            return None
        trial, values = found
        self._take(trial)
        return values

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

    def _new(self) -> tuple[Any, Values] | None:
        """A trial of optuna's with values that are possible and new; None where none are found."""
        for _ in range(ATTEMPTS):
            trial, values = self._ask()
            if self._is_new(values):
                return trial, values
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return next((self._ask(other) for other in self._others() if self._is_new(other)), None)

    def _others(self) -> Iterator[Values]:
        """Values that optuna did not think of: by chance, and then as a grid has them."""
        space = self._sweep.space
        for _ in range(ATTEMPTS):
            yield space.assemble(lambda key, found: found.draw(self._chance))
        for point in islice(space.grid(), len(self._seen) + ATTEMPTS):
            yield space.assemble(partial(self._at, point))

    def _at(self, point: Values, key: str, found: Distribution) -> Any:
        return point[key] if key in point else found.draw(self._chance)

    def _is_new(self, values: Values) -> bool:
        """Whether values are possible, and were neither tried nor looked at before."""
        if values in self._seen:
            return False
        self._seen.append(values)
        return self._is_possible(values)

    def _ask(self, given: Values | None = None) -> tuple[Any, Values]:
        """A trial of optuna's, with values that it chooses, or that are given."""
        if given is not None:
            self._study.enqueue_trial(_as_suggested(self._sweep, given))
        trial = self._study.ask()
        return trial, self._sweep.space.assemble(lambda key, found: _suggest(trial, key, found))

    def _take(self, trial: Any) -> None:
        self._trials[len(self._trials) + 1] = trial


def _suggest(trial: Any, key: str, found: Distribution) -> Any:
    """A value of optuna's; of values that can be counted it chooses the number of one."""
    if found.is_list:
        return found.values[trial.suggest_categorical(key, range(len(found.values)))]
    if found.step is not None:
        return found.at(trial.suggest_int(key, 0, found.num_steps()))
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
        number = found.number_of(value)
        suggested[key] = value if number is None else number
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
