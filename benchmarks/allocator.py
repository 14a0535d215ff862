"""What glibc and large pages cost or save in a step: the same SFT under several environments.

    python benchmarks/allocator.py --model SMOLLM2 --data DATA

Rounds alternate, so that what else the machine does meets all of them. The peak is that of the
process's resident memory, its files' pages among it.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from ray_overhead import parse
from report import Report
from sft_vs_peer import run_file
from trainings import Measured, ours

WARM_UP = 1
MIB = 1 << 20
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "blocks from 1 MiB": {"MALLOC_MMAP_THRESHOLD_": str(MIB)},
    "blocks from 4 MiB, large pages": {
        "MALLOC_MMAP_THRESHOLD_": str(4 * MIB),
        "THP_MEM_ALLOC_ENABLE": "1",
    },
}


def main() -> None:
    """Train under each environment in turn; publish rates and peaks."""
    options = parse(__doc__)
    run = run_file(options.model, options.data, options.steps)
    run |= {"disable_gradient_checkpointing": True, "fp32": True}
    measured: dict[str, list[Measured]] = {name: [] for name in ENVIRONMENTS}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.pairs):
            for number, (name, runs) in enumerate(measured.items()):
                home = Path(scratch, f"{pair}-{number}")
                runs.append(ours(run, home, 2, environ=ENVIRONMENTS[name]))
    report = Report(
        f"The allocator's settings, {options.steps} steps of SFT, 2 threads",
        ["environment", "real tokens/s", "of the first", "peak MiB", "of the first"],
    )
    first: tuple[float, float] | None = None
    for name, runs in measured.items():
        rate = statistics.median(x for one in runs for x in one.step_rates[WARM_UP:])
        peak = statistics.median(one.peak_mib for one in runs)
        first = first or (rate, peak)
        shares = f"{rate / first[0]:.2f}", f"{peak / first[1]:.2f}"
        report.rows.append([name, f"{rate:.0f}", shares[0], f"{peak:.0f}", shares[1]])
        report.details[name] = [vars(one) for one in runs]
    report.publish(options.json)


if __name__ == "__main__":
    main()
