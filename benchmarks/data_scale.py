"""Time and memory of preparing 10,000, 100,000 and 1,000,000 rows, and of opening them.

    python benchmarks/data_scale.py --model SMOLLM2

Made-up rows, two processes. The memory is what each process of the tree has to itself (RssAnon),
looked at every twentieth of a second; mapped files and shared pages are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
import yaml
from report import Report

WORDS = (8, 6, 20)  # of an instruction, an input, an output
MOST_MIB = 1500 * 1e6 / 2**20
MOST_OPENING = 2.0
LINEAR = 1.25  # how much longer a row may take among the most than among fewer
PAUSE_S = 0.05


def main() -> None:
    """Measure and print; or be one of the processes that are measured."""
    if len(sys.argv) == 5 and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](*sys.argv[2:])
        return
    options = parse()
    report = Report(
        f"Preparing rows, {options.processes} processes",
        ["rows", "MB", "tokens", "seconds", "µs a row", "RssAnon of each, MiB", "opened in"],
    )
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for num_rows in options.rows:
            measure(report, Path(scratch, str(num_rows)), num_rows, options)
    each = [detail["seconds"] / detail["rows"] for detail in report.details.values()]
    # what a preparation takes whatever its size stands out among few rows
    if each[-1] > LINEAR * min(each):
        report.failures.append(f"not linear: {each[-1] / min(each):.2f} times as long a row")
    report.publish(options.json)


def measure(report: Report, home: Path, num_rows: int, options: argparse.Namespace) -> None:
    """Add a row of the table."""
    size = synthetic.write(home / "data", options.model, num_rows, WORDS)
    run = home / "run.yaml"
    run.write_text(yaml.safe_dump(run_file(options.model, home / "data", options.processes)))
    built, peaks = child("prepare", home, run)
    opened, more = child("open", home, run)
    most = sorted(peaks.values(), reverse=True)
    report.rows.append(
        [
            f"{num_rows:,}",
            f"{size / 1e6:.0f}",
            f"{built['tokens']:,}",
            f"{built['seconds']:.1f}",
            f"{built['seconds'] / num_rows * 1e6:.0f}",
            ", ".join(f"{peak:.0f}" for peak in most),
            f"{opened['seconds'] * 1e3:.0f} ms",
        ]
    )
    report.details[str(num_rows)] = {
        "rows": num_rows,
        "bytes": size,
        **built,
        "opening": opened["seconds"],
        "rss_anon_mib": most,
        "rss_anon_mib_of_opening": list(more.values()),
    }
    if max(most) > MOST_MIB:
        report.failures.append(f"{num_rows} rows: a process with {max(most):.0f} MiB")
    if opened["seconds"] > MOST_OPENING:
        report.failures.append(f"{num_rows} rows: opened in {opened['seconds']:.2f} s")


def run_file(model: str, data: Path, processes: int) -> dict[str, Any]:
    """The run whose data is prepared, packed too, which looks at all lengths at once."""
    return {
        "model_name_or_path": model,
        "template": "smollm2",
        "stage": "sft",
        "do_train": True,
        "dataset": "rows",
        "dataset_dir": str(data),
        "cutoff_len": 2048,
        "packing": True,
        "output_dir": str(data / "out"),
        "preprocessing_num_workers": processes,
    }


def child(what: str, home: Path, run: Path) -> tuple[dict[str, Any], dict[int, float]]:
    """Run a process to its end; its figures, and the peak of each process of its tree in MiB."""
    out = home / f"{what}.json"
    words = [sys.executable, __file__, what, str(home / "prepared"), str(run), str(out)]
    environ = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    peaks: dict[int, float] = {}
    with (home / "log.txt").open("a") as log:
        process = subprocess.Popen(words, env=environ, stdout=log, stderr=log)
        while process.poll() is None:
            for number in tree(process.pid):
                peaks[number] = max(peaks.get(number, 0), rss_anon(number))
            time.sleep(PAUSE_S)
    if process.returncode:
        raise SystemExit(
            f"{what} ended with {process.returncode}:\n{(home / 'log.txt').read_text()}"
        )
    return json.loads(out.read_text()), peaks


def tree(number: int) -> list[int]:
    """A process and all below it."""
    found = [number]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # the thread has ended
    return found


def rss_anon(number: int) -> float:
    """Anonymous resident memory of a process in MiB; 0 where it has ended."""
    try:
        status = Path(f"/proc/{number}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "x 0")
    return int(line.split()[1]) / 1024


def prepare(root: str, run: str, out: str) -> None:
    """Prepare the data and write how long it took."""
    from llmray.arguments.loading import load
    from llmray.data import prepared

    arguments = load(Path(run))
    model = Path(str(arguments.model.model_name_or_path))
    started = time.perf_counter()
    ref = prepared.ensure(arguments, model, root=Path(root))
    seconds = time.perf_counter() - started
    figures = {"seconds": seconds, "tokens": ref.num_tokens, "path": ref.path}
    Path(out).write_text(json.dumps(figures))


def open_again(root: str, run: str, out: str) -> None:
    """Find the data as a second run does, open it, read a row; write how long that took."""
    import pyarrow.ipc  # noqa: F401 -- imports are not what is measured

    from llmray.arguments.loading import load
    from llmray.data import prepared

    arguments = load(Path(run))
    model = Path(str(arguments.model.model_name_or_path))
    started = time.perf_counter()
    ref = prepared.ensure(arguments, model, root=Path(root))
    table = prepared.open(ref).train
    table.samples(len(table) - 1)
    Path(out).write_text(json.dumps({"seconds": time.perf_counter() - started}))


CHILDREN = {"prepare": prepare, "open": open_again}


def parse() -> argparse.Namespace:
    """The command line; the model may come from the environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("LLMRAY_BENCH_MODEL")
    parser.add_argument(
        "--model", default=default, required=default is None, help="or LLMRAY_BENCH_MODEL"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scratch", help="where the data is written; the temporary directory")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
