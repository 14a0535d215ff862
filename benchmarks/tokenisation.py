"""Tokenisation and feature building beside LLaMA-Factory and beside the bare tokenizer.

    python benchmarks/tokenisation.py --peer-python PEER/venv/bin/python --model SMOLLM2

Made-up rows in the shape of alpaca's; one thread of the tokenizer a process on either side. The
peer is taken twice: its map that tokenizes beside the building of our shards (rows are read,
rendered, tokenized, given targets, written), and all of its preparation beside all of ours. The
bare tokenizer gets the rendered texts, 1000 at a time, and gives nothing back. All run in turns,
each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import synthetic
import yaml
from report import Report
from trainings import peer_versions

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
WORDS = (14, 14, 90)  # of an instruction, an input, an output
OF_PEER, OF_BARE, OF_TWO = 1.6, 0.75, 1.7

PEER, PEER_WHOLE = "peer's map that tokenizes", "peer, whole preparation"
ONE, WHOLE, TWO = "llmray's shards", "llmray, whole preparation", "llmray, two processes, whole"
BARE = "encode_batch_fast alone"


@dataclass(frozen=True)
class Prepared:
    """What a process came to."""

    seconds: float
    tokens: int
    whole: float  # seconds of all of the preparation

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def run_file(model: str, data: Path) -> dict[str, Any]:
    """The run that both programs get."""
    return {
        "model_name_or_path": model,
        "template": "smollm2",
        "default_system": SYSTEM,  # the programs' own defaults differ by a full stop
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(data),
        "cutoff_len": 2048,
        "output_dir": str(data / "out"),
        "report_to": "none",
        "preprocessing_num_workers": 1,
    }


def main() -> None:
    """Measure, compare, publish; or be one of the processes that are measured."""
    if len(sys.argv) == 5 and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](*sys.argv[2:])
        return
    options = parse()
    measured: dict[str, list[Prepared]] = {
        name: [] for name in (PEER, PEER_WHOLE, BARE, ONE, WHOLE, TWO)
    }
    with tempfile.TemporaryDirectory() as scratch:
        size = synthetic.write(Path(scratch, "data"), options.model, options.rows, WORDS)
        run = run_file(options.model, Path(scratch, "data"))
        for number in range(options.rounds):
            home = Path(scratch, str(number))
            if options.peer_python:
                theirs = _peer(run, home / "peer", options.peer_python)
                measured[PEER].append(theirs)
                measured[PEER_WHOLE].append(replace(theirs, seconds=theirs.whole))
            mine = _own("ours", run, home / "one")
            two = _own("ours", {**run, "preprocessing_num_workers": 2}, home / "two")
            measured[ONE].append(mine)
            measured[WHOLE].append(replace(mine, seconds=mine.whole))
            measured[TWO].append(replace(two, seconds=two.whole))
            measured[BARE].append(_own("bare", run, home / "bare"))
    compare(measured, size, options).publish(options.json)


def _peer(run: Mapping[str, Any], home: Path, python: str) -> Prepared:
    probe = Path(__file__).with_name("peer_tokens.py")
    environ = {
        "DISABLE_VERSION_CHECK": "1",
        "USE_RAY": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home / "hf"),
    }
    return _spawn([python, str(probe)], run, home, environ)


def _own(what: str, run: Mapping[str, Any], home: Path) -> Prepared:
    return _spawn([sys.executable, __file__, what, str(home / "prepared")], run, home, {})


def _spawn(
    words: list[str], run: Mapping[str, Any], home: Path, environ: Mapping[str, str]
) -> Prepared:
    home.mkdir(parents=True)
    (home / "run.yaml").write_text(yaml.safe_dump(dict(run)))
    inherited = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    threads = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    words = [*words, str(home / "run.yaml"), str(home / "out.json")]
    with (home / "log.txt").open("w") as log:
        done = subprocess.run(
            words, env={**inherited, **threads, **environ}, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        tail = "\n".join((home / "log.txt").read_text().splitlines()[-25:])
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{tail}")
    found = json.loads((home / "out.json").read_text())
    return Prepared(found["seconds"], found["tokens"], found["whole"])


def ours(root: str, run: str, out: str) -> None:
    """Prepare the data and write how long it took, imports of the tokenizer excluded."""
    from llmray.arguments.loading import load
    from llmray.data import prepared, tokenizer

    arguments = load(Path(run))
    model = Path(str(arguments.model.model_name_or_path))
    tokenizer.load_tokenizer(model, arguments.model)
    building = []

    def build_here(plan: prepared.Plan) -> list[prepared.ShardReport]:
        started = time.perf_counter()
        reports = [prepared.build_shard(plan, index) for index in range(len(plan.shards))]
        building.append(time.perf_counter() - started)
        return reports

    is_alone = arguments.data.preprocessing_num_workers == 1
    started = time.perf_counter()
    ref = prepared.ensure(
        arguments, model, root=Path(root), build_shards=build_here if is_alone else None
    )
    whole = time.perf_counter() - started
    seconds = building[0] if building else whole
    Path(out).write_text(json.dumps({"seconds": seconds, "whole": whole, "tokens": ref.num_tokens}))


def bare(root: str, run: str, out: str) -> None:
    """Tokenize the same texts, rendered before, and write how long it took."""
    from tokenizers import Tokenizer

    from llmray.arguments.loading import load
    from llmray.data import prepared

    arguments = load(Path(run))
    model = str(arguments.model.model_name_or_path)
    plan = prepared.plan(arguments, model, root=Path(root))
    texts = list(_rendered(plan))
    tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = 0
    started = time.perf_counter()
    for first in range(0, len(texts), 1000):
        some = tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
        tokens += sum(map(len, some))
    seconds = time.perf_counter() - started
    Path(out).write_text(json.dumps({"seconds": seconds, "whole": seconds, "tokens": tokens}))


def _rendered(plan: Any) -> Any:
    from llmray.data import files
    from llmray.data.formattings import to_conversation

    for shard in plan.shards:
        for piece, layout in shard.pieces:
            for row in files.read(piece):
                turns = plan.renderer.turns(to_conversation(row, layout, "responses"))
                yield "".join(turn.source + turn.target for turn in turns)


CHILDREN = {"ours": ours, "bare": bare}


def compare(
    measured: Mapping[str, list[Prepared]], size: int, options: argparse.Namespace
) -> Report:
    """The table: medians of rates, and of the ratios within each round."""
    report = Report(
        f"Tokenisation of {options.rows:,} rows, RAYON_NUM_THREADS=1",
        ["what", "tokens/s", "rounds", "seconds", "beside it"],
    )

    goals = {
        PEER: (ONE, OF_PEER),
        PEER_WHOLE: (WHOLE, OF_PEER),
        BARE: (ONE, OF_BARE),
        WHOLE: (TWO, OF_TWO),
    }
    for name, runs in measured.items():
        if not runs:
            continue
        said = ""
        if name in goals:
            other, goal = goals[name]
            pairs = zip(measured[other], runs, strict=True)
            ratio = statistics.median(a.rate / b.rate for a, b in pairs)
            said = f"{other}: {ratio:.2f} times"
            if ratio < goal:
                report.failures.append(f"{name}: {ratio:.2f}, where {goal} is required")
        report.rows.append(
            [
                name,
                f"{statistics.median(one.rate for one in runs):,.0f}",
                ", ".join(f"{one.rate:,.0f}" for one in runs),
                f"{statistics.median(one.seconds for one in runs):.1f}",
                said,
            ]
        )
        report.details[name] = [vars(one) for one in runs]
    tokens = {one.tokens for runs in measured.values() for one in runs}
    if len(tokens) > 1:
        report.failures.append(f"not the same number of tokens: {sorted(tokens)}")
    report.facts = [
        f"Medians of {options.rounds} rounds in turns of {min(tokens):,} tokens, "
        f"{size / 1e6:.0f} MB.",
    ]
    if options.peer_python:
        report.facts.append(f"The peer's environment: {peer_versions(options.peer_python)}.")
    return report


def parse() -> argparse.Namespace:
    """The command line; paths may come from the environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peer, model = (os.environ.get(f"LLMRAY_BENCH_{name}") for name in ("PEER_PYTHON", "MODEL"))
    parser.add_argument(
        "--peer-python", default=peer, help="or LLMRAY_BENCH_PEER_PYTHON; left out, no peer runs"
    )
    parser.add_argument(
        "--model", default=model, required=model is None, help="or LLMRAY_BENCH_MODEL"
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
