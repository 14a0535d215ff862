"""Terminal chat with a base model or an adapter, in the template of the run; answers stream.

    llmray chat run.yaml adapter_name_or_path=out
    echo "What is your name?" | llmray chat run.yaml

/clear forgets the conversation, /system TEXT begins one with another system message (without TEXT
with the run's own, `default_system`), /exit (or Ctrl-D) ends it, Ctrl-C stops an answer. From a
pipe, each line is a message and each answer a paragraph on its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import TextIO

from transformers import TextStreamer

from llmray.arguments.run import RunArguments
from llmray.data.conversation import Message
from llmray.serve.answering import Answerer

log = getLogger("llmray")

CLEAR, EXIT, SYSTEM = ("/clear", "clear"), ("/exit", "exit"), "/system"
COMMANDS = "/clear forgets, /system TEXT sets the system message, /exit ends"
COMMAND = re.compile(r"/[a-z]+")
INTERRUPTED = 130


@dataclass
class _Conversation:
    """What was said; `system` None stands for the run's own system message."""

    messages: list[Message] = field(default_factory=list)
    system: str | None = None


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
        print(f"{COMMANDS}, Ctrl-C stops an answer.", file=target)
    talk = _Conversation()
    try:
        for line in _lines(source, is_terminal):
            if line in EXIT:
                break
            if line and not _obey(line, talk):
                talk.messages.append(Message("user", line))
                answer = _answer(answerer, talk, target)
                talk.messages.append(answer)
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


def _obey(line: str, talk: _Conversation) -> bool:
    """Do what a command says; returns whether the line is one."""
    word, _, text = line.partition(" ")
    if line in CLEAR:
        talk.messages.clear()
        log.info("the conversation is forgotten")
    elif word == SYSTEM:
        talk.messages.clear()
        talk.system = text.strip() or None
        log.info("a new conversation, with %s system message", "that" if text else "the run's")
    elif COMMAND.fullmatch(line):
        log.warning("%s is no command: %s", line, COMMANDS)
    else:
        return False
    return True


def _answer(answerer: Answerer, talk: _Conversation, target: TextIO) -> Message:
    """Write the answer to the last message, and return it; Ctrl-C cuts it short."""
    history = talk.messages
    prompt = answerer.prompt_ids(history, talk.system)
    while not answerer.fits(prompt) and len(history) > 1:
        del history[:2]
        log.info("the oldest turn is forgotten: prompt and response would not fit the model")
        prompt = answerer.prompt_ids(history, talk.system)
    if not answerer.has_room(prompt):
        log.warning("the message leaves no room for an answer: write a shorter one, or /clear")
        return Message("assistant", "")
    if answerer.sampling.num_beams > 1:  # beams are known only at their end
        [ids] = answerer.generate([prompt])
        print(answerer.text(ids, plain=False), file=target, flush=True)
        return answerer.said(ids)
    streamer = _Streamer(answerer, target)
    try:
        [ids] = answerer.generate([prompt], streamer)
    except KeyboardInterrupt:
        print(" ...", file=target, flush=True)
        return Message("assistant", streamer.text)
    return answerer.said(ids)


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
