"""A search space over keys, in a form that knows no searcher: what may be drawn, and when.

`parse` reads the `search` and `variants` of a sweep; `Space.assemble` makes one set of values with
whatever draws them: a seeded generator, a grid, a searcher that learns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from typing import Any, Literal

from llmray.arguments.problems import Problem, shown

Kind = Literal["choice", "grid", "uniform", "loguniform", "quniform", "randint"]
Values = dict[str, Any]  # key -> value of one trial

LISTS = ("choice", "grid")
RANGES = ("uniform", "loguniform", "quniform", "randint")
FORMS: dict[str, str] = {
    "choice": "{choice: [4, 8]}",
    "grid": "{grid: [4, 8]}",
    "uniform": "{uniform: [low, high]}",
    "loguniform": "{loguniform: [low, high]}, both above 0",
    "quniform": "{quniform: [low, high, step]}, whole steps from low to high",
    "randint": "{randint: [low, high]}, whole numbers, both of which may be drawn",
}
VARIANT = "variant"  # what the choice among whole variants is called
SIGNIFICANT_DIGITS = 6  # of a drawn number, so that files show what was used
MANY = 100_000  # values of one key that are still counted one by one
FEW = 100  # values of one key that are tried for a condition that names it


@dataclass(frozen=True)
class Distribution:
    """What one key may be: `values` of a list, or `low` to `high`, both included, by `step`."""

    kind: Kind
    values: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None  # of quniform, and 1 of randint

    @property
    def is_list(self) -> bool:
        """Whether its values are listed."""
        return self.kind in LISTS

    def ends(self) -> tuple[Any, ...]:
        """All values of a list, or both ends of a range."""
        return self.values if self.is_list else (self.low, self.high)

    def points(self) -> tuple[Any, ...] | None:
        """All values in their order; None where they cannot be counted."""
        if self.is_list:
            return self.values
        if self.step is None or self.num_steps() > MANY:
            return None
        return tuple(self.at(number) for number in range(self.num_steps() + 1))

    def draw(self, generator: random.Random) -> Any:
        """A value by chance."""
        if self.is_list:
            return self.values[generator.randrange(len(self.values))]
        if self.step is not None:
            return self.at(generator.randint(0, self.num_steps()))
        if self.kind == "loguniform":
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = generator.uniform(self.low, self.high)
        return min(max(rounded(drawn), self.low), self.high)

    def num_steps(self) -> int:
        """How many steps lead from low to high, of a range that has steps."""
        assert self.step is not None
        return round((self.high - self.low) / self.step)

    def at(self, number: int) -> float:
        """The value so many steps above low."""
        assert self.step is not None
        value = self.low + number * self.step
        whole = all(isinstance(part, int) for part in (self.low, self.step))
        return int(value) if whole else rounded(value)

    def number_of(self, value: Any) -> int | None:
        """Which of its values that is, from 0; None of a range without steps."""
        if self.is_list:
            return self.values.index(value)
        return None if self.step is None else round((value - self.low) / self.step)


@dataclass(frozen=True)
class Dimension:
    """A key that is searched, and the values of other keys with which alone it counts."""

    key: str
    distribution: Distribution
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Whether the key counts beside these values of the others."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())


Choose = Callable[[str, Distribution], Any]


@dataclass(frozen=True)
class Space:
    """Keys in an order in which each stands behind those that it depends on, and whole variants."""

    dimensions: tuple[Dimension, ...] = ()
    variants: tuple[Values, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that differ between trials, those of variants first."""
        of_variants = [key for variant in self.variants for key in variant]
        return tuple(dict.fromkeys([*of_variants, *(found.key for found in self.dimensions)]))

    @property
    def choices(self) -> tuple[Dimension, ...]:
        """The dimensions, and before them the choice among variants where there are any."""
        if not self.variants:
            return self.dimensions
        numbers = Distribution("grid", tuple(range(len(self.variants))))
        return (Dimension(VARIANT, numbers), *self.dimensions)

    def restricted(self, known: Collection[str]) -> Space:
        """The space without the keys that are not among those `known`."""
        dimensions = self.dimensions
        while True:
            kept = tuple(d for d in dimensions if d.key in known and set(d.when) <= set(known))
            if kept == dimensions:
                break
            known = set(known) - {d.key for d in dimensions if d not in kept}
            dimensions = kept
        variants = ({k: v for k, v in variant.items() if k in known} for variant in self.variants)
        return Space(dimensions, tuple(variants))

    def assemble(self, choose: Choose) -> Values:
        """The values of one trial.

        Args:
            choose: draws from a distribution, which is that of the key it is given first; `variant`
                stands for the number of a variant. Asked in order, and for active keys alone.
        """
        values: Values = {}
        for dimension in self.choices:
            if not dimension.is_active(values):
                continue
            chosen = choose(dimension.key, dimension.distribution)
            values |= self.variants[chosen] if dimension.key == VARIANT else {dimension.key: chosen}
        return values

    def grid(self, *, only: Sequence[str] | None = None) -> Iterator[Values]:
        """What is chosen at each point of the grid over keys with countable values, in order.

        Unlike trials these name a variant by its number. A key that does not count at a point is
        left out there.

        Args:
            only: the keys that make the grid; not given, all that can be counted.
        """
        yield from self._grid(self.choices, {}, {}, only)

    def _grid(
        self,
        rest: Sequence[Dimension],
        chosen: Values,
        values: Values,
        only: Sequence[str] | None,
    ) -> Iterator[Values]:
        if not rest:
            yield chosen
            return
        first, rest = rest[0], rest[1:]
        points = first.distribution.points()
        is_left_out = points is None or (only is not None and first.key not in only)
        if is_left_out or not first.is_active(values):
            yield from self._grid(rest, chosen, values, only)
            return
        for point in points or ():
            more = self.variants[point] if first.key == VARIANT else {first.key: point}
            yield from self._grid(rest, chosen | {first.key: point}, values | more, only)

    def probes(self) -> Iterator[tuple[str, Values]]:
        """Every variant, and every end of every key with the others at their first: name, values.

        A key whose condition never holds has none.
        """
        for dimension in self.choices:
            held = self._held(dimension)
            for end in () if held is None else dimension.distribution.ends():
                yield dimension.key, self._with(held | {dimension.key: end})  # type: ignore[operator]

    def _held(self, dimension: Dimension) -> Values | None:
        """Choices under which the key counts; None where there are none."""
        above = [d for d in self.choices if d.key == VARIANT or self._decides(d, dimension)]
        for chosen in product(*(_candidates(d.distribution) for d in above)):
            held = dict(zip((d.key for d in above), chosen, strict=True))
            if dimension.is_active(self._with(held)):
                return held
        return None

    def _with(self, held: Mapping[str, Any]) -> Values:
        """The values of the trial that has what is `held`, and else the first of everything."""
        return self.assemble(lambda key, d: held[key] if key in held else d.ends()[0])

    def _decides(self, other: Dimension, dimension: Dimension) -> bool:
        """Whether `dimension` depends on `other`, directly or not."""
        if other.key in dimension.when:
            return True
        named = [found for found in self.dimensions if found.key in dimension.when]
        return any(self._decides(other, found) for found in named)


def _candidates(distribution: Distribution) -> tuple[Any, ...]:
    points = distribution.points()
    return points if points is not None and len(points) <= FEW else distribution.ends()


def rounded(value: float) -> float:
    """The number with as many digits as files show."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def parse(search: Mapping[str, Any], variants: Sequence[Any]) -> tuple[Space, list[Problem]]:
    """The space that a sweep's `search` and `variants` say, and all that is wrong with them.

    Whether keys exist and take these values is left to whoever knows keys.
    """
    problems = list(_of_variants(variants, search))
    whole = tuple(dict(variant) for variant in variants if isinstance(variant, Mapping))
    found = {}
    for key, given in search.items():
        read = _dimension(str(key), given)
        if isinstance(read, Dimension):
            found[read.key] = read
        else:
            problems.append(read)
    # of a key that is wrong itself it is not said that others name it
    known = {str(key) for key in search} | {key for variant in whole for key in variant}
    ordered, unordered = _in_order(found, known)
    problems += unordered
    space = Space(ordered, whole)
    if not problems:
        reached = {key for key, _ in space.probes()}
        problems += [_never(d) for d in ordered if d.key not in reached]
    return space, problems


def _of_variants(variants: Sequence[Any], search: Mapping[str, Any]) -> Iterator[Problem]:
    for number, variant in enumerate(variants, 1):
        if not isinstance(variant, Mapping) or not variant:
            yield _problem(
                f"variant {number} is {shown(variant)}: a mapping of keys to values is required, "
                "such as {finetuning_type: full}. Mend it."
            )
        elif twice := sorted(set(map(str, variant)) & set(search)):
            yield _problem(
                f"{', '.join(twice)} stands in search and in variant {number}: one would go before "
                "the other. Keep one of them."
            )


def _dimension(key: str, given: Any) -> Dimension | Problem:
    forms = "; ".join(FORMS.values())
    if not isinstance(given, Mapping):
        listed = isinstance(given, list)
        advice = f"Write {{choice: {shown(given)}}}" if listed else "Write one of these"
        return _problem(
            f"{key}: {shown(given)} says no distribution. {advice}, of the forms {forms}; or move "
            "a fixed value out of search."
        )
    kinds = [name for name in given if name != "when"]
    if len(kinds) != 1 or kinds[0] not in FORMS:
        close = get_close_matches(str(kinds[0]), FORMS, n=1, cutoff=0.5) if kinds else []
        advice = f"Did you mean {close[0]}?" if close and len(kinds) == 1 else "Write one of these."
        said = ", ".join(map(str, kinds)) or "nothing"
        return _problem(
            f"{key}: {said} is no distribution; one is required, of the forms {forms}. {advice}"
        )
    when = given.get("when", {})
    if not isinstance(when, Mapping) or ("when" in given and not when):
        return _problem(
            f"{key}: when={shown(when)} is no condition. Write such as when: {{finetuning_type: "
            "lora}, or a list of values."
        )
    kind = kinds[0]
    read = _listed(key, kind, given[kind]) if kind in LISTS else _range(key, kind, given[kind])
    if isinstance(read, Problem):
        return read
    allowed = {
        str(name): tuple(value) if isinstance(value, list) else (value,)
        for name, value in when.items()
    }
    return Dimension(key, read, allowed)


def _listed(key: str, kind: Kind, values: Any) -> Distribution | Problem:
    if not isinstance(values, list) or not values:
        return _problem(
            f"{key}: {kind}={shown(values)}: a list of values is required, such as {FORMS[kind]}."
        )
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        return _problem(f"{key}: {kind} has {shown(twice[0])} twice. Keep one of them.")
    return Distribution(kind, tuple(values))


def _range(key: str, kind: Kind, given: Any) -> Distribution | Problem:
    numbers = given if isinstance(given, list) else []
    are_numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    count = 3 if kind == "quniform" else 2
    if len(numbers) != count or not are_numbers or not all(map(math.isfinite, numbers)):
        return _wrong_range(key, kind, given, f"{count} numbers are required")
    low, high, step = numbers[0], numbers[1], numbers[2] if kind == "quniform" else None
    wrong = None
    if low >= high:
        wrong = "low must be below high"
    elif kind == "loguniform" and low <= 0:
        wrong = "low must be above 0"
    elif kind == "randint" and not all(float(number).is_integer() for number in numbers):
        wrong = "both must be whole numbers"
    elif step is not None and (step <= 0 or not _is_whole((high - low) / step)):
        wrong = "step must be above 0 and lead from low to high in whole steps"
    if wrong:
        return _wrong_range(key, kind, given, wrong)
    if kind == "randint":
        return Distribution(kind, low=int(low), high=int(high), step=1)
    return Distribution(kind, low=low, high=high, step=step)


def _wrong_range(key: str, kind: str, given: Any, why: str) -> Problem:
    return _problem(f"{key}: {kind}={shown(given)}: {why}. Write {FORMS[kind]}.")


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6


def _in_order(
    found: Mapping[str, Dimension], known: set[str]
) -> tuple[tuple[Dimension, ...], list[Problem]]:
    """The dimensions, each behind those of its condition, and what cannot be ordered."""
    problems = []
    for dimension in found.values():
        for name in sorted(set(dimension.when) - known):
            close = get_close_matches(name, known, n=1, cutoff=0.6)
            advice = f"Did you mean {close[0]}?" if close else "Search it, or remove the condition."
            problems.append(
                _problem(
                    f"{dimension.key}: when names {name}, which is not searched, so that it is the "
                    f"same in all trials. {advice}"
                )
            )
    ordered: dict[str, Dimension] = {}
    rest = dict(found)
    while rest:
        ready = [d for d in rest.values() if not set(d.when) & set(rest)]
        if not ready:
            problems.append(
                _problem(
                    f"the conditions of {', '.join(rest)} name one another in a circle. Remove one."
                )
            )
            break
        for dimension in ready:
            ordered[dimension.key] = rest.pop(dimension.key)
    return tuple(ordered.values()), problems


def _never(dimension: Dimension) -> Problem:
    said = " and ".join(
        f"{key} is {' or '.join(map(shown, allowed))}" for key, allowed in dimension.when.items()
    )
    return _problem(
        f"{dimension.key} counts when {said}, which no trial can be. Mend the condition, or what "
        "these keys may be."
    )


def _problem(text: str) -> Problem:
    return Problem(("tune",), f"tune: {text}")
