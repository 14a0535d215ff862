"""Time and fullness of packing a million rows into bins, beside first fit decreasing.

    python benchmarks/packing.py

Lengths are skewed as those of conversations are: most rows short, a few cut to the bin's size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from report import Report

from llmray.data.packing import pack

SHAPES = {  # capacity of a bin -> median length of a row
    2048: 160,
    8192: 160,
    131072: 4000,
}
MOST_SECONDS = 2.5
MOST_BINS = 1.005  # of first fit's


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    report = Report(
        f"Packing {options.rows:,} rows of skewed length, median of three",
        ["bin", "median row", "seconds", "bins", "full", "bins of first fit", "more"],
    )
    for capacity, median in SHAPES.items():
        measure(report, skewed(options.rows, median, capacity), capacity)
    report.publish(options.json)


def skewed(count: int, median: int, capacity: int) -> np.ndarray:
    """Lengths in tokens, (count,) int32, log-normal, cut to the capacity."""
    draw = np.random.default_rng(0).lognormal(np.log(median), 1.1, count)
    return np.clip(draw, 2, capacity).astype(np.int32)


def measure(report: Report, lengths: np.ndarray, capacity: int) -> None:
    """Add a row of the table."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        made = pack(lengths, capacity)
        seconds.append(time.perf_counter() - started)
    reference = first_fit_decreasing(lengths, capacity)
    middle, more = statistics.median(seconds), made.num_bins / reference
    fullness = made.efficiency(lengths)
    report.rows.append(
        [
            capacity,
            int(np.median(lengths)),
            f"{middle:.2f}",
            made.num_bins,
            f"{fullness:.2%}",
            reference,
            f"{more - 1:+.3%}",
        ]
    )
    report.details[str(capacity)] = {"seconds": seconds, "bins": [made.num_bins, reference]}
    if middle > MOST_SECONDS:
        report.failures.append(f"bins of {capacity}: {middle:.2f} s, above {MOST_SECONDS} s")
    if more > MOST_BINS:
        report.failures.append(f"bins of {capacity}: {more - 1:.3%} more bins than first fit")


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """How many bins it needs; the leftmost with room is found through a tree of maxima."""
    leaves = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    used = 0
    for length in np.sort(lengths)[::-1].tolist():
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        used = max(used, node - leaves + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            larger = left if left > right else right
            if room[node] == larger:
                break
            room[node] = larger
    return used


if __name__ == "__main__":
    main()
