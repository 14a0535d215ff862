"""Runs inside the peer's environment: LLaMA-Factory's `train`, with a stopwatch on every update.

Writes one JSON object an update to the file that LLMRAY_PROBE_OUT names: seconds since the end of
the update before, real tokens, loss. It changes nothing that is computed.
"""

import json
import os
import sys
import time

from llamafactory.cli import main
from transformers import Trainer, TrainerCallback


class Stopwatch(TrainerCallback):
    """Times updates; the trainer's log, which follows each, brings the loss."""

    def __init__(self):
        self.tokens = 0
        self.mark = self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Take the time of the update that ends."""
        now = time.perf_counter()
        self.seconds, self.mark = now - self.mark, now

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the update's line."""
        if "loss" not in (logs or {}):
            return
        line = {"seconds": self.seconds, "tokens": self.tokens, "loss": float(logs["loss"])}
        with open(os.environ["LLMRAY_PROBE_OUT"], "a") as file:
            file.write(json.dumps(line) + "\n")
        self.tokens = 0


def install():
    """Give every trainer a stopwatch that also counts the tokens of its inputs."""
    build, step = Trainer.__init__, Trainer.training_step

    def timed_build(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.stopwatch = Stopwatch()
        self.add_callback(self.stopwatch)

    def counted_step(self, model, inputs, *args, **kwargs):
        masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
        self.stopwatch.tokens += sum(int(mask.sum()) for mask in masks)
        return step(self, model, inputs, *args, **kwargs)

    Trainer.__init__, Trainer.training_step = timed_build, counted_step


if __name__ == "__main__":
    install()
    sys.argv = ["llamafactory-cli", "train", *sys.argv[1:]]
    main()
