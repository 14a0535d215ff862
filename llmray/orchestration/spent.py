"""What a sweep costs beside its trials, and what these share: seconds of workers, rows, weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmray.data.prepared import PreparedRef
from llmray.model.mapped import Load
from llmray.orchestration.trial_board import Look


@dataclass
class Spent:
    """Seconds of all slots, and what their workers loaded."""

    starting: list[float] = field(default_factory=list)  # of each slot, until workers asked
    busy: float = 0.0  # trials, from first line to last
    between: float = 0.0  # slots whose workers waited for a trial
    loads: list[tuple[str, Load]] = field(default_factory=list)  # of base weights, by node

    def note(self, look: Look) -> None:
        """Add what the last look at a slot tells."""
        self.busy += look.busy_s
        self.between += look.idle_s
        self.loads += look.loads
        if look.asked_after_s is not None:
            self.starting.append(look.asked_after_s)

    def lines(self, num_trials: int, prepared: Collection[Any]) -> Iterator[str]:
        """It in words.

        Args:
            num_trials: that were trained.
            prepared: the references of all data sets of the sweep.
        """
        rows = sum(ref.num_built for ref in prepared if isinstance(ref, PreparedRef))
        sets = f"{len({ref.key for ref in prepared})} prepared set(s)"
        yield f"data: {sets} for {num_trials} trials, {rows} rows tokenized for this"
        for address in sorted({address for address, _ in self.loads}):
            yield described_loads(address, [load for at, load in self.loads if at == address])
        if self.starting and self.busy:
            yield (
                f"workers: {len(self.starting)} group(s), ready after {max(self.starting):.1f} s "
                f"at most; {self.busy:.1f} s in trials, {self.between:.1f} s between them "
                f"({100 * self.between / self.busy:.1f} %)"
            )


def described_loads(address: str, loads: Sequence[Load]) -> str:
    """How often a node's memory holds base weights, in words."""
    largest = {load.directory: load.num_mapped for load in loads if load.num_mapped}
    shared, copied = sum(largest.values()), sum(load.num_bytes - load.num_mapped for load in loads)
    return (
        f"base weights on {address}: {len(loads)} loads; {_mib(shared)} mapped once and "
        f"shared by them, {_mib(copied)} copied by all together"
    )


def _mib(num_bytes: int) -> str:
    number = num_bytes / 2**20
    return f"{number:.0f} MiB" if number >= 10 or not number else f"{number:.2f} MiB"
