"""Runs inside the peer's environment: LLaMA-Factory's stage ppo, with a stopwatch on every step.

Writes one JSON object a step to the file that LLMRAY_PROBE_OUT names: seconds since the end of the
step before, tokens of the responses, loss, mean reward, and seconds in sampling, scoring and
TRL's own step. With LLMRAY_PROBE_FP32 forward passes are in float32: on a processor the peer puts
them under torch's autocast, which is bf16 there, whatever the run file says.
"""

import json
import os
import sys
import time
from contextlib import nullcontext

from llamafactory.cli import main
from llamafactory.train.ppo.trainer import CustomPPOTrainer
from transformers import TrainerCallback

parts = {}


class Stopwatch(TrainerCallback):
    """Times steps; the log that follows each brings the loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Take the time of the step that ends."""
        now = time.perf_counter()
        self.seconds, self.mark = now - self.mark, now

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the step's line; it is not there yet in what is passed on."""
        last = state.log_history[-1]
        line = {"seconds": self.seconds, "loss": last["loss"], "reward": last["reward"], **parts}
        with open(os.environ["LLMRAY_PROBE_OUT"], "a") as file:
            file.write(json.dumps(line) + "\n")
        parts.clear()


def timed(name, function):
    """`function`, whose seconds add up in a part."""

    def run(self, *args, **kwargs):
        started = time.perf_counter()
        result = function(self, *args, **kwargs)
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - started
        if name == "rollout":
            parts["tokens"] = parts.get("tokens", 0) + sum(map(len, result[1]))
        return result

    return run


def install():
    """Give the trainer a stopwatch, and float32 where that is asked for."""
    build = CustomPPOTrainer.__init__

    def timed_build(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.add_callback(Stopwatch())
        if os.environ.get("LLMRAY_PROBE_FP32"):
            self.amp_context = nullcontext()

    CustomPPOTrainer.__init__ = timed_build
    CustomPPOTrainer.get_inputs = timed("rollout", CustomPPOTrainer.get_inputs)
    CustomPPOTrainer.get_rewards = timed("scores", CustomPPOTrainer.get_rewards)
    CustomPPOTrainer.step = timed("update", CustomPPOTrainer.step)


if __name__ == "__main__":
    install()
    sys.argv = ["llamafactory-cli", "train", *sys.argv[1:]]
    main()
