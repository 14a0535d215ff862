"""How calls of tools are written as text, and read back from it: the pieces of `tools.FORMATS`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmray.data.conversation import ToolCall

Calls = tuple[ToolCall, ...]
Found = tuple[str, Calls]  # what a response says beside its calls, and the calls
Schemas = Mapping[str, Mapping[str, Any]]  # by a tool's name, its parameters' properties

NAME = re.compile(r"[\w.:/-]+")
DECODER = json.JSONDecoder()


def as_json(value: Any) -> str:
    """A value as JSON, on one line."""
    return json.dumps(value, ensure_ascii=False)


def as_object(call: ToolCall, arguments: str = "arguments") -> dict[str, Any]:
    """A call as an object."""
    return {"name": call.name, arguments: call.arguments}


def _from_object(value: Any, arguments: str) -> ToolCall:
    is_call = isinstance(value, dict) and isinstance(value.get("name"), str)
    if not is_call or not isinstance(value.get(arguments), dict):
        raise ValueError(f"no call: {value!r}")
    return ToolCall(value["name"], value[arguments])


# --- marks around each call, or around all of them -----------------------------------------------


def _marked(text: str, pattern: re.Pattern[str]) -> tuple[str, list[re.Match[str]]]:
    """What stands before the first match of a pattern and after the last one, and all matches."""
    matches = list(pattern.finditer(text))
    if not matches:
        return text, []
    return (text[: matches[0].start()] + text[matches[-1].end() :]).strip(), matches


def json_between(start: str, end: str) -> Callable[[str, Schemas], Found]:
    """Reads marked calls, each an object; several between two marks stand in lines."""
    pattern = re.compile(re.escape(start) + r"\s*(.*?)\s*" + re.escape(end), re.DOTALL)

    def extract(text: str, schemas: Schemas) -> Found:
        said, matches = _marked(text, pattern)
        calls = [
            _from_object(json.loads(line), "arguments")
            for match in matches
            for line in match[1].split("\n")
        ]
        return said, tuple(calls)

    return extract


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """The value of an argument that is written without quotes."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


@dataclass(frozen=True)
class Tagged:
    """Calls as tags around each argument, whose values stand without quotes.

    `call` and `argument` are patterns of what `write_call` and `write_argument` write: the first
    has groups for name and arguments, the second for key and value.
    """

    call: re.Pattern[str]
    argument: re.Pattern[str]
    write_call: Callable[[str, str], str]
    write_argument: Callable[[str, str], str]
    between: str = "\n"
    around: tuple[str, str] = ("", "")

    def write(self, calls: Calls) -> str:
        """The text of calls."""
        texts = (
            self.write_call(
                call.name,
                "".join(self.write_argument(k, _plain(v)) for k, v in call.arguments.items()),
            )
            for call in calls
        )
        return self.between.join(texts).join(self.around)

    def extract(self, text: str, schemas: Schemas) -> Found:
        """Reads what `write` writes."""
        said, matches = _marked(text, self.call)
        for mark in self.around:
            said = said.replace(mark.strip(), "", 1) if matches and mark else said
        calls = []
        for match in matches:
            known = schemas.get(match["name"], {})
            pairs = self.argument.finditer(match["arguments"])
            arguments = {p["key"]: _value(p["value"], known.get(p["key"], {})) for p in pairs}
            calls.append(ToolCall(match["name"], arguments))
        return said.strip() if matches else said, tuple(calls)


QWEN3_5 = Tagged(
    re.compile(
        r"<tool_call>\s*<function=(?P<name>[^>\n]+)>(?P<arguments>.*?)</function>\s*</tool_call>",
        re.DOTALL,
    ),
    re.compile(r"<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>", re.DOTALL),
    lambda name, text: f"<tool_call>\n<function={name}>\n{text}</function>\n</tool_call>",
    lambda key, value: f"<parameter={key}>\n{value}\n</parameter>\n",
)
SEED_OSS = Tagged(
    re.compile(
        r"<seed:tool_call>\s*<function=(?P<name>[^>\n]+)>(?P<arguments>.*?)</function>\s*"
        r"</seed:tool_call>",
        re.DOTALL,
    ),
    re.compile(r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>", re.DOTALL),
    lambda name, text: f"<seed:tool_call>\n<function={name}>\n{text}</function>\n</seed:tool_call>",
    lambda key, value: f"<parameter={key}>{value}</parameter>\n",
)
GLM4_MOE = Tagged(
    re.compile(r"<tool_call>(?P<name>[^<\n]+)\n?(?P<arguments>.*?)</tool_call>", re.DOTALL),
    re.compile(
        r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL
    ),
    lambda name, text: f"<tool_call>{name}\n{text}</tool_call>",
    lambda key, value: f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
)
MINIMAX2 = Tagged(
    re.compile(r'<invoke name="(?P<name>[^"\n]+)">\n?(?P<arguments>.*?)</invoke>', re.DOTALL),
    re.compile(r'<parameter name="(?P<key>[^"\n]+)">(?P<value>.*?)</parameter>', re.DOTALL),
    lambda name, text: f'<invoke name="{name}">\n{text}</invoke>',
    lambda key, value: f'<parameter name="{key}">{value}</parameter>\n',
    around=("\n<minimax:tool_call>\n", "\n</minimax:tool_call>"),
)


# --- the formats one by one ----------------------------------------------------------------------


def default_calls(calls: Calls) -> str:
    """Calls as an action and its input."""
    return "\n".join(f"Action: {c.name}\nAction Input: {as_json(c.arguments)}" for c in calls)


ACTION = re.compile(r"Action:[ \t]*(?P<name>[^\n]+?)[ \t]*\nAction Input:\s*")


def default_extract(text: str, schemas: Schemas) -> Found:
    """Reads `default_calls`."""
    calls, said, at = [], "", 0
    while match := ACTION.search(text, at):
        value, stop = DECODER.raw_decode(text, match.end())
        said += text[at : match.start()]
        calls.append(_from_object({"name": match["name"], "arguments": value}, "arguments"))
        at = stop
    return (said + text[at:]).strip() if calls else text, tuple(calls)


QUOTE = '<|"|>'


def gemma4_value(value: Any) -> str:
    """A value as Gemma 4 writes it: texts in its own quotes, keys in order."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        inner = (f"{key}:{gemma4_value(each)}" for key, each in sorted(value.items()))
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(gemma4_value, value)) + "]"
    return as_json(value)


def gemma4_calls(calls: Calls) -> str:
    """Calls between the marks of Gemma 4."""
    return "".join(
        f"<|tool_call>call:{c.name}{gemma4_value(c.arguments)}<tool_call|>" for c in calls
    )


GEMMA4_CALL = re.compile(
    r"<\|tool_call>call:(?P<name>[^{\n]+)(?P<value>\{.*?\})<tool_call\|>", re.S
)
GEMMA4_ATOM = re.compile(r"[^,\]}]+")
GEMMA4_KEY = re.compile(r"([^:{},\[\]]+):")


def gemma4_extract(text: str, schemas: Schemas) -> Found:
    """Reads `gemma4_calls`."""
    said, matches = _marked(text, GEMMA4_CALL)
    calls = []
    for match in matches:
        value, stop = _gemma4_read(match["value"], 0)
        if stop != len(match["value"]):
            raise ValueError("words after a call's arguments")
        calls.append(ToolCall(match["name"], value))
    return said, tuple(calls)


def _gemma4_read(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends."""
    if text.startswith(QUOTE, at):
        stop = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : stop], stop + len(QUOTE)
    if text[at] in "{[":
        return _gemma4_many(text, at)
    match = GEMMA4_ATOM.match(text, at)
    if match is None:
        raise ValueError(f"no value at {at}")
    return json.loads(match[0]), match.end()


def _gemma4_many(text: str, at: int) -> tuple[Any, int]:
    is_object, end = text[at] == "{", "}" if text[at] == "{" else "]"
    pairs: dict[str, Any] = {}
    items: list[Any] = []
    at += 1
    while text[at] != end:
        if text[at] == ",":
            at += 1
        key = GEMMA4_KEY.match(text, at) if is_object else None
        if is_object and key is None:
            raise ValueError(f"no key at {at}")
        value, at = _gemma4_read(text, key.end() if key else at)
        if key:
            pairs[key[1]] = value
        else:
            items.append(value)
    return (pairs if is_object else items), at + 1


def glm4_extract(text: str, schemas: Schemas) -> Found:
    """Reads a call that is a name and, on the next line, its arguments."""
    before, _, call = text.rpartition("<|assistant|>")
    name, _, arguments = call.strip().partition("\n")
    if not NAME.fullmatch(name):
        return text, ()
    return before.strip(), (
        _from_object({"name": name, "arguments": json.loads(arguments)}, "arguments"),
    )


def llama3_calls(calls: Calls) -> str:
    """One call as an object, several as a list."""
    objects = [as_object(call, "parameters") for call in calls]
    return as_json(objects[0] if len(objects) == 1 else objects)


def json_at_end(arguments: str) -> Callable[[str, Schemas], Found]:
    """Reads a response that is, or ends with, a call or a list of calls in JSON."""

    def extract(text: str, schemas: Schemas) -> Found:
        body = text.rstrip()
        for at in _openings(body):
            try:
                value, stop = DECODER.raw_decode(body, at)
                entries = value if isinstance(value, list) else [value]
                calls = tuple(_from_object(entry, arguments) for entry in entries)
            except ValueError:
                continue
            if stop == len(body) and calls:
                return body[:at].strip().removesuffix("[TOOL_CALLS]").strip(), calls
        return text, ()

    return extract


def _openings(text: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r'(?:\[\s*)?\{\s*"name"', text))


def lfm2_calls(calls: Calls) -> str:
    """Calls as a list in Python."""
    shown = (
        f"{c.name}({', '.join(f'{k}={_literal(v)}' for k, v in c.arguments.items())})"
        for c in calls
    )
    return f"<|tool_call_start|>[{', '.join(shown)}]<|tool_call_end|>"


def _literal(value: Any) -> str:
    """A value as Python writes it, texts in double quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{as_json(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return as_json(value) if isinstance(value, str) else repr(value)


LFM2_CALLS = re.compile(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", re.DOTALL)


def lfm2_extract(text: str, schemas: Schemas) -> Found:
    """Reads `lfm2_calls`."""
    said, matches = _marked(text, LFM2_CALLS)
    calls = []
    for match in matches:
        node = ast.parse(match[1].strip(), mode="eval").body
        for each in node.elts if isinstance(node, ast.List) else [node]:
            if not isinstance(each, ast.Call) or each.args:
                raise ValueError("no call")
            arguments = {k.arg or "": ast.literal_eval(k.value) for k in each.keywords}
            calls.append(ToolCall(ast.unparse(each.func), arguments))
    return said, tuple(calls)


def wrapped_calls(calls: Calls) -> str:
    """Each call as an object between the marks of Qwen."""
    return "\n".join(f"<tool_call>\n{as_json(as_object(call))}\n</tool_call>" for call in calls)
