"""Where the time of a training goes on a CPU: kinds of operations, as torch's profiler sees them.

    python benchmarks/where_time_goes.py --model SMOLLM2 --data DATA

The run is that of sft_vs_peer.py, in this process, under the profiler (which costs some per cent).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from report import Report
from sft_vs_peer import run_file

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("_fused_adam", "_foreach", "aten::lerp", "aten::addcdiv"),
    "moving and joining": ("aten::copy_", "aten::cat", "aten::index", "aten::split", "aten::fill_"),
}


def main() -> None:
    """Profile one run, publish the shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("model", "data"):
        default = os.environ.get(f"LLMRAY_BENCH_{flag.upper()}")
        parser.add_argument(f"--{flag}", default=default, required=default is None)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    import torch
    from torch.profiler import ProfilerActivity, profile

    from llmray import local
    from llmray.arguments.loading import load

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run = run_file(options.model, options.data, options.steps)
        run |= {"disable_gradient_checkpointing": True, "fp32": True, "output_dir": scratch}
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            local.train(load(run))
        results = json.loads(Path(scratch, "train_results.json").read_text())
    seconds = results["train_tokens"] / results["train_tokens_per_second"]
    taken: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in profiler.key_averages():
        taken[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        names[event.key] += event.self_cpu_time_total / 1e6
    report = Report(
        f"Where {options.steps} updates spend their time, {options.threads} threads",
        ["kind", "seconds", "share"],
        facts=[
            f"{seconds:.1f} s in updates, profiler included; the sum of the rows also holds "
            "loading and saving.",
            "Dearest: " + ", ".join(f"{name} {s:.1f} s" for name, s in names.most_common(12)),
        ],
        details={"operations": dict(names.most_common(60)), "results": results},
    )
    for kind, part in taken.most_common():
        report.rows.append([kind, f"{part:.1f}", f"{part / taken.total():.0%}"])
    report.publish(options.json)


def kind_of(operation: str) -> str:
    """The kind that an operation of the profiler belongs to."""
    for kind, starts in KINDS.items():
        if any(start in operation for start in starts):
            return kind
    return "element by element" if operation.startswith("aten::") else "outside operations"


if __name__ == "__main__":
    main()
