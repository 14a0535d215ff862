"""Data sets of made-up rows in the shape of alpaca's, the same on every machine.

Words are those that a tokenizer has whole, often or seldom as words of a language are, and one in
eight is two of them in one, so that a word takes about as many tokens as in real text.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

NUM_WORDS = 12_000
SHORTEST = 3  # letters of a word
COMPOUND = 0.125  # share of words that are two in one
LINE_WORDS = 14  # a sentence, then a stop


class Writer:
    """Draws texts of words that follow Zipf's law."""

    def __init__(self, model: str, seed: int = 0) -> None:
        vocabulary = json.loads(Path(model, "tokenizer.json").read_text())["model"]["vocab"]
        words = [
            word[1:]
            for word in sorted(vocabulary, key=vocabulary.__getitem__)  # the more frequent first
            if len(word) > SHORTEST and word[0] == "Ġ" and word[1:].isalpha() and word[1:].isascii()
        ]
        self._draw = np.random.default_rng(seed)
        chosen = np.array(words[:NUM_WORDS], object)
        weights = 1 / (np.arange(len(chosen)) + 2.7)
        self._words, self._limits = chosen, np.cumsum(weights / weights.sum())

    def texts(self, lengths: np.ndarray) -> list[str]:
        """Texts of so many words each."""
        count = int(lengths.sum())
        words = self._some(count)
        joined = self._draw.random(count) < COMPOUND
        words[joined] = words[joined] + self._some(int(joined.sum()))
        ends = np.arange(count) % LINE_WORDS == LINE_WORDS - 1
        words[ends] = words[ends] + "."
        pieces = np.split(words, np.cumsum(lengths)[:-1])
        return [" ".join(piece).capitalize() for piece in pieces]

    def _some(self, count: int) -> np.ndarray:
        places = np.searchsorted(self._limits, self._draw.random(count))
        return self._words[np.minimum(places, len(self._words) - 1)]


def write(folder: Path, model: str, num_rows: int, words: tuple[int, int, int]) -> int:
    """Write a folder with the data set `rows`; returns the bytes of its file.

    Args:
        folder: is made.
        model: a folder with a byte-level tokenizer.json.
        num_rows: how many.
        words: the median number of words in an instruction, in an input (four rows in ten have
            one) and in an output.
    """
    folder.mkdir(parents=True)
    path = folder / "rows.json"
    writer = Writer(model)
    with path.open("w") as file:
        file.write("[")
        for first in range(0, num_rows, 1000):
            count = min(1000, num_rows - first)
            lines = [json.dumps(row) for row in _rows(writer, first, count, words)]
            file.write((",\n" if first else "\n") + ",\n".join(lines))
        file.write("\n]\n")
    info = {"rows": {"file_name": path.name}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return path.stat().st_size


def _rows(
    writer: Writer, first: int, count: int, words: tuple[int, int, int]
) -> list[dict[str, str]]:
    draw = np.random.default_rng([1, first])
    columns = []
    for median in words:
        lengths = draw.lognormal(np.log(median), 0.7, count)
        columns.append(writer.texts(np.clip(lengths, 1, 12 * median).astype(int)))
    has_input = draw.random(count) < 0.4
    return [
        {
            "instruction": f"{columns[0][i]} (case {first + i})",
            "input": columns[1][i] if has_input[i] else "",
            "output": columns[2][i],
        }
        for i in range(count)
    ]
