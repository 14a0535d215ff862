"""Text formats of tools: how a model is told of them, how it calls them, and the calls in a text.

FORMATS holds a row for each name of `tool_format`. What a row writes for calls, it reads back to
the same calls (`tool_calls`). `templates` puts the texts into conversations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmray.data import tool_calls
from llmray.data.conversation import RowError
from llmray.data.tool_calls import Calls, Found, Schemas

Tool = Mapping[str, Any]  # a function's name, description, and parameters as a JSON schema


@dataclass(frozen=True)
class ToolFormat:
    """A format of tools.

    Attributes:
        prompt: the text that tells of tools.
        gap: what stands between a system message and that text.
        alone: what that text begins with where there is no system message.
        calls: the text of calls, in their order.
        extract: the calls in a response, given the schemas of tools where these are known.
        beside: what stands between words beside calls and the calls.
        is_single: whether a response has one call at most.
    """

    prompt: Callable[[Sequence[Tool]], str]
    calls: Callable[[Calls], str]
    extract: Callable[[str, Schemas], Found]
    gap: str = ""
    alone: str = ""
    beside: str = "\n"
    is_single: bool = False


def read_tools(text: str) -> list[Tool]:
    """The tools in the JSON text of a row, each without the wrapper of its type.

    Raises:
        RowError: it is something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RowError(
            f"the tools are not JSON ({error}). Required: a list of tools. Mend the row."
        ) from None
    tools: list[Tool] = []
    for entry in value if isinstance(value, list) else [value]:
        inner = entry.get("function", entry) if isinstance(entry, dict) else entry
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(
                f"a tool is {json.dumps(entry)[:60]}. Required: an object with name, description "
                "and parameters, or one of type function that holds it. Mend the row."
            )
        tools.append(inner)
    return tools


def write_calls(name: str, calls: Calls) -> str:
    """The text of calls in the format of a name.

    Raises:
        RowError: the format cannot write them so that they can be read back.
    """
    made = FORMATS[name]
    if made.is_single and len(calls) > 1:
        raise RowError(
            f"a response makes {len(calls)} calls at once, and tool_format={name} knows one. Name "
            "another tool_format, or split the response."
        )
    for call in calls:
        for word in (call.name, *call.arguments):
            if not tool_calls.NAME.fullmatch(word):
                raise RowError(
                    f"a call names {word!r}. Required: a name of letters, digits and . _ - / : in "
                    "tools and their arguments. Mend the row."
                )
    text = made.calls(calls)
    try:
        is_read_back = made.extract(text, _kinds(calls)) == ("", calls)
    except (ValueError, SyntaxError, RecursionError):
        is_read_back = False
    if not is_read_back:
        raise RowError(
            f"a call of {', '.join(call.name for call in calls)} holds text that "
            f"tool_format={name} uses as its marks, so it could not be read back. Name another "
            "tool_format, or mend the row."
        )
    return text


def extract_calls(name: str, text: str, tools: Sequence[Tool] = ()) -> Found:
    """What a response says beside its calls, and its calls; no calls if it makes none.

    Args:
        name: of the format.
        text: the response, without its thought and its end.
        tools: those that the model was told of. Formats that write text without quotes need them
            to tell text from numbers.
    """
    schemas = {tool["name"]: (tool.get("parameters") or {}).get("properties", {}) for tool in tools}
    try:
        said, calls = FORMATS[name].extract(text, schemas)
    except (ValueError, SyntaxError, RecursionError):
        return text, ()
    return (said, calls) if calls else (text, ())


def _kinds(calls: Calls) -> Schemas:
    """Schemas that say of each argument that is a text that it is one."""
    return {
        call.name: {
            key: {"type": "string"} for key, v in call.arguments.items() if isinstance(v, str)
        }
        for call in calls
    }


def _typed(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": tool}


# --- the formats one by one ----------------------------------------------------------------------


def _default_prompt(tools: Sequence[Tool]) -> str:
    shown = []
    for tool in tools:
        schema = tool.get("parameters") or {}
        lines = [
            _default_argument(name, spec, name in schema.get("required", ()))
            for name, spec in schema.get("properties", {}).items()
        ]
        shown.append(
            f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\n"
            "Tool Args:\n" + "".join(lines) + "\n"
        )
    names = ", ".join(tool["name"] for tool in tools)
    return (
        "You have access to the following tools:\n" + "".join(shown) + "Use the following format "
        "if using a tool:\n```\n"
        f"Action: tool name (one of [{names}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _default_argument(name: str, spec: Mapping[str, Any], is_required: bool) -> str:
    notes = ", required" if is_required else ""
    if spec.get("enum"):
        notes += f", should be one of [{', '.join(map(str, spec['enum']))}]"
    if spec.get("items"):
        notes += f", where each item should be {spec['items'].get('type', '')}"
    return f"  - {name} ({spec.get('type', '')}{notes}): {spec.get('description', '')}\n"


def _gemma4_prompt(tools: Sequence[Tool]) -> str:
    return "".join(f"<|tool>{_gemma4_tool(tool)}<tool|>" for tool in tools)


def _gemma4_tool(tool: Tool) -> str:
    parts = [f"description:{tool_calls.gemma4_value(tool.get('description', ''))}"]
    if tool.get("parameters"):
        parts.append(f"parameters:{_gemma4_schema(tool['parameters'])}")
    return f"declaration:{tool['name']}{{{','.join(parts)}}}"


def _gemma4_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema with the names of types in capitals, its type last."""
    parts = []
    for key in ("description", "nullable", "enum", "properties", "items", "required"):
        value = schema.get(key)
        if not value:
            continue
        if key == "properties":
            inner = (f"{name}:{_gemma4_schema(spec)}" for name, spec in sorted(value.items()))
            parts.append(f"properties:{{{','.join(inner)}}}")
        elif key == "items":
            parts.append(f"items:{_gemma4_schema(value)}")
        else:
            parts.append(f"{key}:{tool_calls.gemma4_value(value)}")
    if schema.get("type"):
        kind = schema["type"]
        upper = [k.upper() for k in kind] if isinstance(kind, list) else kind.upper()
        parts.append(f"type:{tool_calls.gemma4_value(upper)}")
    return "{" + ",".join(parts) + "}"


def _glm4_prompt(tools: Sequence[Tool]) -> str:
    shown = "".join(
        f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。"
        for tool in tools
    )
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 "
        "模型开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具" + shown
    )


def _llama3_prompt(tools: Sequence[Tool]) -> str:
    return (
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "You have access to the following functions. To call a function, please respond with JSON "
        'for a function call. Respond in the format {"name": function name, "parameters": '
        "dictionary of argument name and its value}. Do not use variables.\n\n"
        + "".join(json.dumps(_typed(t), indent=4, ensure_ascii=False) + "\n\n" for t in tools)
    )


def _in_lines(before: str, after: str, shown: Callable[[Tool], str]) -> Any:
    return lambda tools: before + "".join(shown(tool) + "\n" for tool in tools) + after


# The text that a family of models was trained with; it is data.
_XML = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_QWEN_PROMPT = _in_lines(
    _XML,
    "</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    lambda tool: tool_calls.as_json(_typed(tool)),
)

FORMATS: dict[str, ToolFormat] = {
    "default": ToolFormat(_default_prompt, tool_calls.default_calls, tool_calls.default_extract),
    "gemma4": ToolFormat(
        _gemma4_prompt, tool_calls.gemma4_calls, tool_calls.gemma4_extract, beside=""
    ),
    "glm4": ToolFormat(
        _glm4_prompt,
        lambda calls: f"{calls[0].name}\n{tool_calls.as_json(calls[0].arguments)}",
        tool_calls.glm4_extract,
        beside="<|assistant|>",
        is_single=True,
    ),
    "glm4_moe": ToolFormat(
        _in_lines(
            _XML,
            "</tools>\n\nFor each function call, output the function name and arguments within "
            "the following XML format:\n<tool_call>{function-name}\n"
            "<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
            "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n"
            "</tool_call>",
            lambda tool: tool_calls.as_json(_typed(tool)),
        ),
        tool_calls.GLM4_MOE.write,
        tool_calls.GLM4_MOE.extract,
        gap="\n\n",
        beside="",
    ),
    "lfm2": ToolFormat(
        lambda tools: (
            f"List of tools: <|tool_list_start|>{tool_calls.as_json(list(tools))}<|tool_list_end|>"
        ),
        tool_calls.lfm2_calls,
        tool_calls.lfm2_extract,
        gap="\n",
        beside="",
    ),
    "ling": ToolFormat(
        lambda tools: f"{_QWEN_PROMPT(tools)}\ndetailed thinking off",
        tool_calls.wrapped_calls,
        tool_calls.json_between("<tool_call>", "</tool_call>"),
        gap="\n",
    ),
    "llama3": ToolFormat(
        _llama3_prompt, tool_calls.llama3_calls, tool_calls.json_at_end("parameters")
    ),
    "minimax1": ToolFormat(
        _in_lines(
            "You are provided with these tools:\n<tools>\n",
            "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> "
            "XML tags, and provide tool-name and json-object of arguments, following the format "
            'below:\n<tool_calls>\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n'
            "...\n</tool_calls>",
            tool_calls.as_json,
        ),
        lambda calls: (
            "<tool_calls>\n"
            + "".join(tool_calls.as_json(tool_calls.as_object(c)) + "\n" for c in calls)
            + "</tool_calls>"
        ),
        tool_calls.json_between("<tool_calls>", "</tool_calls>"),
    ),
    "minimax2": ToolFormat(
        _in_lines(
            "# Tools\nYou may call one or more tools to assist with the user query.\n"
            "Here are the tools available in JSONSchema format:\n\n<tools>\n",
            "</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass "
            'parameters:\n\n<minimax:tool_call>\n<invoke name="tool-name-1">\n'
            '<parameter name="param-key-1">param-value-1</parameter>\n'
            '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n'
            "</minimax:tool_call>",
            lambda tool: f"<tool>{tool_calls.as_json(tool)}</tool>",
        ),
        tool_calls.MINIMAX2.write,
        tool_calls.MINIMAX2.extract,
        gap="\n\n",
        beside="",
    ),
    "mistral": ToolFormat(
        lambda tools: (
            f"[AVAILABLE_TOOLS] {tool_calls.as_json([_typed(t) for t in tools])}[/AVAILABLE_TOOLS]"
        ),
        lambda calls: tool_calls.as_json([tool_calls.as_object(call) for call in calls]),
        tool_calls.json_at_end("arguments"),
        beside="",
    ),
    "qwen": ToolFormat(
        _QWEN_PROMPT,
        tool_calls.wrapped_calls,
        tool_calls.json_between("<tool_call>", "</tool_call>"),
        gap="\n\n",
    ),
    "qwen3_5": ToolFormat(
        _in_lines(
            "# Tools\n\nYou have access to the following functions:\n\n<tools>\n",
            "</tools>\n\nIf you choose to call a function ONLY reply in the following format with "
            "NO suffix:\n\n<tool_call>\n<function=example_function_name>\n"
            "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
            "<parameter=example_parameter_2>\nThis is the value for the second parameter\n"
            "that can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
            "<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: an inner "
            "<function=...></function> block must be nested within <tool_call></tool_call> XML "
            "tags\n- Required parameters MUST be specified\n- You may provide optional reasoning "
            "for your function call in natural language BEFORE the function call, but NOT after\n"
            "- If there is no function call available, answer the question like normal with your "
            "current knowledge and do not tell the user about function calls\n</IMPORTANT>",
            lambda tool: tool_calls.as_json(tool),
        ),
        tool_calls.QWEN3_5.write,
        tool_calls.QWEN3_5.extract,
        gap="\n\n",
        beside="\n\n",
    ),
    "seed_oss": ToolFormat(
        lambda tools: (
            "Tool List:\nYou are authorized to use the following tools (described in JSON Schema "
            "format). Before performing any task, you must decide how to call them based on the "
            "descriptions and parameters of these tools.\n"
            f"{tool_calls.as_json([_typed(tool) for tool in tools])}\n"
            "工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
            "<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>"
            "This is the value for the second parameter\nthat can span\nmultiple lines"
            "</parameter>\n</function>\n</seed:tool_call>\n"
        ),
        tool_calls.SEED_OSS.write,
        tool_calls.SEED_OSS.extract,
        gap="\n",
        alone="You are Doubao, a helpful AI assistant. You may call one or more functions to "
        "assist with the user query.\n",
        beside="\n\n",
    ),
}
