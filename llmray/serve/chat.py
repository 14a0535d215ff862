"""Terminal chat with a base model or an adapter, in the template of the run; answers stream.

    llmray chat run.yaml adapter_name_or_path=out
    echo "What is your name?" | llmray chat run.yaml

/clear forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer. From a pipe,
each line is a message and each answer a paragraph on its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import TextIO

from transformers import TextStreamer

from llmray.arguments.run import RunArguments
from llmray.data.conversation import Message
from llmray.serve.answering import Answerer

log = getLogger("llmray")

CLEAR, EXIT = ("/clear", "clear"), ("/exit", "exit")
INTERRUPTED = 130


def chat(
    arguments: RunArguments, *, source: TextIO | None = None, target: TextIO | None = None
) -> int:
    """Talk until the input ends; returns the exit code.

    Args:
        arguments: of the run whose model answers.
        source: where messages come from, line by line; the terminal or pipe if None.
        target: where answers go; the standard output if None.

    Raises:
        LlmrayError: if the model cannot be loaded.
    """
    source, target = source or sys.stdin, target or sys.stdout
    _point_to_result(arguments)
    answerer = Answerer.load(arguments)
    is_terminal = source.isatty()
    if is_terminal:
        print("/clear forgets, /exit ends, Ctrl-C stops an answer.", file=target)
    history: list[Message] = []
    try:
        for line in _lines(source, is_terminal):
            if line in EXIT:
                break
            if line in CLEAR:
                history.clear()
                log.info("the conversation is forgotten")
            elif line:
                history.append(Message("user", line))
                answer = _answer(answerer, history, target)
                history.append(Message("assistant", answer))
    except KeyboardInterrupt:  # while waiting for a message
        print(file=target)
        return INTERRUPTED
    return 0


class _Streamer(TextStreamer):
    """Writes an answer to `target` as its tokens come, and keeps its text."""

    def __init__(self, answerer: Answerer, target: TextIO) -> None:
        super().__init__(
            answerer.tokenizer,
            skip_prompt=True,
            skip_special_tokens=answerer.skips_special,
            clean_up_tokenization_spaces=False,
        )
        self.target = target
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", file=self.target, flush=True)


def _lines(source: TextIO, is_terminal: bool) -> Iterator[str]:
    """Messages without blanks around them."""
    if not is_terminal:
        yield from (line.strip() for line in source)
        return
    import readline  # noqa: F401  # gives input() its line editing and history

    while True:
        try:
            yield input("\n> ").strip()
        except EOFError:
            return


def _answer(answerer: Answerer, history: list[Message], target: TextIO) -> str:
    """Write the answer to the last message, and return its text; Ctrl-C cuts it short."""
    prompt = answerer.prompt_ids(history)
    while not answerer.fits(prompt) and len(history) > 1:
        del history[:2]
        log.info("the oldest turn is forgotten: prompt and response would not fit the model")
        prompt = answerer.prompt_ids(history)
    if not answerer.has_room(prompt):
        log.warning("the message leaves no room for an answer: write a shorter one, or /clear")
        return ""
    if answerer.sampling.num_beams > 1:  # beams are known only at their end
        [ids] = answerer.generate([prompt])
        print(answerer.text(ids, plain=False), file=target, flush=True)
        return answerer.text(ids, plain=True)
    streamer = _Streamer(answerer, target)
    try:
        [ids] = answerer.generate([prompt], streamer)
    except KeyboardInterrupt:
        print(" ...", file=target, flush=True)
        return streamer.text
    return answerer.text(ids, plain=True)


def _point_to_result(arguments: RunArguments) -> None:
    """Say so where a run's adapter lies ready, and the base model is what will answer."""
    output_dir = arguments.training.output_dir
    if arguments.model.adapter_name_or_path or output_dir is None:
        return
    if (Path(output_dir) / "adapter_config.json").is_file():
        log.info(
            "the base model answers; adapter_name_or_path=%s asks what this file trained",
            output_dir,
        )
