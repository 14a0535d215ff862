"""Compares named templates with their models' own chat templates, of files that you have.

    python tests/own_templates.py qwen3=/models/Qwen3-8B gemma3=/models/gemma-3-4b-it
    python tests/own_templates.py glm4_moe=chat_template.jinja --write

A file is a tokenizer's folder, whose ids are compared too, or a chat template by itself. It prints
a line for each probe, and the first place where texts differ; exit code 1 if any do. `--write`
keeps what the models' own templates wrote in tests/data/own_texts.json, with which
tests/data/test_own_templates.py compares without the files. For a tokenizer without a chat
template it keeps the ids of the named template's text, which say that its tokens are the model's.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmray.data.conversation import Conversation, Message, RowError, ToolCall
from llmray.data.encoding import Encoder
from llmray.data.templates import TEMPLATES, TemplateRenderer

KEPT = Path(__file__).parent / "data" / "own_texts.json"

USER, ASSISTANT = Message("user", "What is 17 + 25?"), Message("assistant", "It is 42.")
AGAIN = Message("user", "And straße + 北京 🙂?")
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a city.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "Its name."},
                        "days": {"type": "number", "description": "How many."},
                    },
                    "required": ["city"],
                },
            },
        }
    ]
)
CALL = ToolCall("get_weather", {"city": "Köln", "days": 2})
OTHER = ToolCall("get_weather", {"city": "Paris", "days": 1})


@dataclass(frozen=True)
class Probe:
    """A conversation; `prompt` leaves its last response out."""

    conversation: Conversation
    prompt: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def called(*calls: ToolCall, said: str = "", thought: str | None = None) -> tuple[Message, ...]:
    results = tuple(f"Rain in {call.arguments['city']}" for call in calls)
    return (
        USER,
        Message("function", said, thought, calls),
        Message("observation", "\n".join(results), results=results),
        Message("assistant", "Rain.", thought),
    )


PLAIN = Conversation((USER, ASSISTANT, AGAIN, Message("assistant", "No.\n\nSorry.")))
THOUGHT = (
    Message("assistant", "It is 42.", "Add the tens."),
    AGAIN,
    Message("assistant", "No.", "Cities are no numbers.\nSo no."),
)
PROBES: dict[str, Probe] = {
    "turns": Probe(PLAIN),
    "system": Probe(Conversation(PLAIN.messages, "Be brief.")),
    "prompt": Probe(PLAIN, prompt=True),
    "prompt without thinking": Probe(PLAIN, prompt=True, options={"enable_thinking": False}),
    "thoughts": Probe(Conversation((USER, *THOUGHT))),
    "call": Probe(Conversation(called(CALL), "Be brief.", TOOLS)),
    "calls without system": Probe(Conversation(called(CALL, OTHER), None, TOOLS)),
    "words beside a call": Probe(Conversation(called(CALL, said="Wait."), "Be brief.", TOOLS)),
    "thought before a call": Probe(Conversation(called(CALL, thought="Look."), None, TOOLS)),
}


def named_text(name: str, probe: Probe, bos: str, eos: str) -> str:
    """What the named template writes for a probe, as in inference."""
    template = TEMPLATES[name]
    made = TemplateRenderer(
        template, template.default_system, bos, eos, learns_past=False, **probe.options
    )
    said = probe.conversation
    if probe.prompt:
        return made.prompt(said.messages[:-1], said.system, said.tools)
    return "".join(turn.source + turn.target for turn in made.turns(said))


def own_text(chat_template: str, special: dict[str, str], probe: Probe) -> str:
    """What a model's own chat template writes for a probe."""
    from llmray.data.chat_template import ChatTemplateRenderer

    switches = {"enable_thinking": True, **probe.options}
    made = ChatTemplateRenderer(chat_template, special, None, switches)
    said = probe.conversation
    if probe.prompt:
        return made.prompt(said.messages[:-1], said.system, said.tools)
    return made.text(said)


def opened(path: Path) -> tuple[str | None, dict[str, str], Any]:
    """A chat template, the special tokens and, of a folder, the tokenizer."""
    if path.is_file():
        return path.read_text(encoding="utf-8"), {"bos_token": "<bos>", "eos_token": "<eos>"}, None
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(path))
    special = {key: str(value) for key, value in loaded.special_tokens_map.items()}
    return loaded.chat_template, special, loaded


def ids_differ(name: str, label: str, probe: Probe, loaded: Any, own: list[int]) -> bool:
    """Print and say whether features would have other ids than the tokenizer's for the text."""
    bos, eos = loaded.bos_token or "", loaded.eos_token or ""
    encoder = Encoder(str(loaded.backend_tokenizer.to_str()))
    template = TEMPLATES[name]
    made = TemplateRenderer(
        template, template.default_system, bos, eos, learns_past=False, **probe.options
    )
    said = probe.conversation
    turns = [] if probe.prompt else made.turns(said)
    parts = [part for turn in turns for part in (turn.source, turn.target)]
    ids = encoder.encode_parts([parts or [named_text(name, probe, bos, eos)]]).ids.tolist()
    if ids != own:
        print(f"{name}: {label}: IDS DIFFER\n  own   {own}\n  named {ids}")
    return ids != own


def compare(name: str, path: Path) -> tuple[dict[str, Any], int]:
    """Print how a template's probes compare; what its model's own wrote, how many differ."""
    chat_template, special, loaded = opened(path)
    bos, eos = special.get("bos_token", ""), special.get("eos_token", "")
    kept: dict[str, Any] = {"bos": bos, "eos": eos, "texts": {}, "ids": {}}
    num_different = 0
    for label, probe in PROBES.items():
        if probe.conversation.tools and TEMPLATES[name].tool_format == "default":
            continue  # a format of no model's own
        try:
            named = named_text(name, probe, bos, eos)
            own = named if chat_template is None else own_text(chat_template, special, probe)
        except RowError as error:
            print(f"{name}: {label}: not compared: {error}")
            continue
        if own != named:
            num_different += 1
            at = next((i for i in range(len(own)) if own[: i + 1] != named[: i + 1]), len(own))
            print(f"{name}: {label}: DIFFERS")
            for whose, text in (("own", own), ("named", named)):
                print(f"  {whose:6}{text[max(0, at - 40) :]!r}")
            continue
        print(f"{name}: {label}: same, {len(own)} characters")
        kept["texts"][label] = own
        if loaded is not None:
            kept["ids"][label] = loaded(own, add_special_tokens=False)["input_ids"]
            num_different += ids_differ(name, label, probe, loaded, kept["ids"][label])
    return kept, num_different


def as_text(kept: dict[str, Any]) -> str:
    """JSON with the ids of each text on one line."""
    text = json.dumps(kept, ensure_ascii=False, indent=1, sort_keys=True)
    return re.sub(r"(?<=[\d\[,])\n +(?=[\d\]])|(?<=\d)\n +(?=\])", "", text) + "\n"


def main(words: list[str]) -> int:
    """Compare what the words name; the exit code."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    different = 0
    for word in words:
        if word == "--write":
            continue
        name, _, path = word.partition("=")
        found, count = compare(name, Path(path))
        different += count
        kept[name] = found
    if "--write" in words:
        KEPT.write_text(as_text(kept), encoding="utf-8")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
