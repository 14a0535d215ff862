"""The reward server beside `llmray score`: texts a second by one client and by sixteen.

    python benchmarks/reward_server.py --model FOLDER

All score the same texts by the same model with a random value head, in turns. A client sends one
text a request over a connection of its own and waits for its answer; clients share this machine
with the server. Texts are of about 32 tokens, and of lengths as answers of a chat model have.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from report import Report

NUM_CLIENTS = 16
LEAST_OF_SCORE = 0.85  # of the texts a second of `llmray score`, by all clients
LEAST_GAIN = 1.3  # over one client, on short texts
HOST = "127.0.0.1"
ROUTE = "/v1/score/evaluation"
WORDS = [
    "the",
    "a",
    "model",
    "reads",
    "writes",
    "answer",
    "question",
    "short",
    "long",
    "river",
    "city",
    "winter",
    "summer",
    "seven",
    "ten",
    "bees",
    "make",
    "honey",
    "which",
    "planet",
    "goes",
    "around",
    "sun",
    "moon",
    "water",
    "name",
    "of",
    "in",
    "and",
    "is",
    "what",
    "red",
    "blue",
    "capital",
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal model")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write raw figures there")
    options = parser.parse_args()
    columns = ("texts", "tokens", "`llmray score`", "1 client", f"{NUM_CLIENTS} clients")
    report = Report("Reward server, texts a second", columns)
    with tempfile.TemporaryDirectory() as folder:
        model = with_head(options.model.absolute(), Path(folder) / "model")
        words = [f"model_name_or_path={model}", "stage=rm", "infer_dtype=float32"]
        with running(words) as port:
            for kind in ("short", "mixed"):
                texts = make_texts(kind, options.texts)
                measure(report, kind, texts, words, port, Path(folder), options.rounds)
    report.publish(options.json)


def measure(
    report: Report,
    kind: str,
    texts: Sequence[str],
    words: Sequence[str],
    port: int,
    folder: Path,
    rounds: int,
) -> None:
    """Add a row: medians over rounds, and what is not as required."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    rates: dict[str, list[float]] = {"score": [], "one": [], "many": []}
    ask(port, texts[:NUM_CLIENTS], NUM_CLIENTS)  # warm
    tokens = 0
    for _ in range(rounds):
        rate, tokens, expected = by_command(words, path)
        rates["score"].append(rate)
        for name, clients in (("one", 1), ("many", NUM_CLIENTS)):
            started = time.perf_counter()
            found = ask(port, texts, clients)
            rates[name].append(len(texts) / (time.perf_counter() - started))
            worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            if worst > 1e-4:
                report.failures.append(f"{kind}: scores differ by {worst:.1e}")
    score, one, many = (statistics.median(rates[name]) for name in ("score", "one", "many"))
    report.rows.append(
        [f"{len(texts)} {kind}", tokens, f"{score:.1f}", f"{one:.1f}", f"{many:.1f}"]
    )
    report.details[kind] = rates
    share = many / score
    report.facts.append(f"{kind}: {NUM_CLIENTS} clients reach {share:.2f} of `llmray score`")
    if share < LEAST_OF_SCORE:
        report.failures.append(f"{kind}: {share:.2f} of `llmray score`, below {LEAST_OF_SCORE}")
    if kind == "short":
        report.facts.append(f"short: {NUM_CLIENTS} clients are {many / one:.2f} times one")
        if many / one < LEAST_GAIN:
            report.failures.append(f"short: {many / one:.2f} times one client, below {LEAST_GAIN}")


def make_texts(kind: str, count: int) -> list[str]:
    """Random texts in a chat model's format: all short, or of lengths that differ."""
    draw = np.random.default_rng(0)
    texts = []
    for _ in range(count):
        length = 20 if kind == "short" else int(np.clip(draw.lognormal(4.0, 0.8), 5, 400))
        said = " ".join(draw.choice(WORDS, length))
        texts.append(
            f"<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
        )
    return texts


def by_command(words: Sequence[str], path: Path) -> tuple[float, int, list[float]]:
    """Texts a second without loading, tokens, and the rewards, of `llmray score`."""
    command = [sys.executable, "-m", "llmray", "score", *words, "--input", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = re.search(r"scored \d+ texts, (\d+) tokens, in [\d.]+ s: ([\d.]+) texts", done.stderr)
    assert said is not None, done.stderr
    scores = [json.loads(line)["score"] for line in done.stdout.splitlines()]
    return float(said[2]), int(said[1]), scores


def ask(port: int, texts: Sequence[str], num_clients: int) -> list[float]:
    """The rewards by clients that each send one text a request, the next when it is answered."""

    def client(number: int) -> list[float]:
        connection = http.client.HTTPConnection(HOST, port, timeout=300)
        scores = []
        for text in texts[number::num_clients]:
            body = json.dumps({"model": "m", "messages": [text]})
            connection.request("POST", ROUTE, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status == 200, found
            scores += found["scores"]
        connection.close()
        return scores

    scores = [0.0] * len(texts)
    with ThreadPoolExecutor(num_clients) as pool:
        for number, found in enumerate(pool.map(client, range(num_clients))):
            scores[number::num_clients] = found
    return scores


@contextmanager
def running(words: Sequence[str]) -> Iterator[int]:
    """The port of a server that is ready, until the end of the block."""
    command = [sys.executable, "-m", "llmray", "reward-server", *words, "--port", "0"]
    environ = {**os.environ, "API_KEY": ""}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r" at http://[\d.]+:(\d+)/", line):
                yield int(found[1])
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(30)


def with_head(model: Path, folder: Path) -> Path:
    """A folder with the model's files and a random value head."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    size = json.loads((model / "config.json").read_text())["hidden_size"]
    torch.manual_seed(0)
    head = {"v_head.summary.weight": torch.randn(1, size) / size**0.5}
    save_file({**head, "v_head.summary.bias": torch.zeros(1)}, folder / "value_head.safetensors")
    return folder


if __name__ == "__main__":
    main()
