"""Runs inside the peer's environment: LLaMA-Factory prepares a data set, with a stopwatch.

    python peer_tokens.py RUN_FILE OUT_JSON

Writes the seconds of its map that tokenizes, those of the whole preparation, and the tokens.
"""

import json
import sys
import time

import datasets
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from yaml import safe_load


def main(run_file, out):
    """Prepare and write the figures."""
    seconds = {}
    plain_map = datasets.Dataset.map

    def timed_map(self, *args, **kwargs):
        started = time.perf_counter()
        mapped = plain_map(self, *args, **kwargs)
        seconds[str(kwargs.get("desc"))] = time.perf_counter() - started
        return mapped

    datasets.Dataset.map = timed_map
    with open(run_file) as file:
        model, data, training, _, _ = get_train_args(safe_load(file))
    loaded = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
    started = time.perf_counter()
    rows = get_dataset(template, model, data, training, stage="sft", **loaded)["train_dataset"]
    whole = time.perf_counter() - started
    tokens = sum(map(len, rows["input_ids"]))
    (tokenized,) = (took for name, took in seconds.items() if "tokenizer" in name)
    with open(out, "w") as file:
        json.dump({"seconds": tokenized, "whole": whole, "tokens": tokens}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
