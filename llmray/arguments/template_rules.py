"""The names of templates and tool formats, and the rules about them.

`llmray.data.template_table` and `llmray.data.tools` have what the names stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from llmray.arguments.method_rules import Rule
from llmray.arguments.problems import Problem

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

# fmt: off
TEMPLATES = (
    "aeva", "alpaca", "bailing", "bailing_v2", "breeze", "chatglm3", "chatml", "chatml_de",
    "cohere", "cpm4", "custom", "dbrx", "deepseek", "deepseek3", "deepseekcoder", "deepseekr1",
    "default", "dots_ocr", "empty", "ernie", "ernie_nothink", "ernie_vl", "exaone", "falcon",
    "falcon_h1", "fewshot", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4n", "glm4",
    "glm4_5v", "glm4_7", "glm4_moe", "glm4v", "glm_ocr", "glmz1", "gpt_oss", "granite3",
    "granite3_vision", "granite4", "hunyuan", "hunyuan_small", "hy3", "hy_dense_1_8b",
    "hy_dense_7b", "index", "intern2", "intern_s1", "intern_vl", "keye_vl", "kimi_vl", "lfm2",
    "lfm2_vl", "llama2", "llama2_zh", "llama3", "llama4", "llava", "llava_next",
    "llava_next_llama3", "llava_next_mistral", "llava_next_qwen", "llava_next_video",
    "llava_next_video_mistral", "llava_next_video_yi", "llava_next_yi", "mimo", "mimo_v2",
    "mimo_vl", "minicpm_o", "minicpm_v", "minicpm_v_4_6", "minimax1", "minimax2", "ministral",
    "ministral3", "mistral", "mistral_small", "mllama", "moonlight", "moss_vl", "olmo",
    "openchat", "openchat-3.6", "opencoder", "paligemma", "paligemma_chat", "phi", "phi4",
    "phi4_mini", "phi_small", "pixtral", "qwen", "qwen2_audio", "qwen2_omni", "qwen2_vl", "qwen3",
    "qwen3_5", "qwen3_5_nothink", "qwen3_6", "qwen3_nothink", "qwen3_omni", "qwen3_omni_nothink",
    "qwen3_vl", "qwen3_vl_nothink", "sailor", "seed_coder", "seed_oss", "smollm", "smollm2",
    "solar", "starchat", "telechat2", "vicuna", "video_llava", "xuanyuan", "yi", "yi_vl", "youtu",
    "youtu_vl", "yuan", "zephyr",
)
# fmt: on
TOOL_FORMATS = (
    "default",
    "gemma4",
    "glm4",
    "glm4_moe",
    "lfm2",
    "ling",
    "llama3",
    "minimax1",
    "minimax2",
    "mistral",
    "qwen",
    "qwen3_5",
    "seed_oss",
)


def template_is_known(arguments: RunArguments) -> Iterator[Problem]:
    """A template is one of the table."""
    name = arguments.data.template
    if name is not None and name not in TEMPLATES:
        yield Problem(
            ("template",),
            f"template={name} is not known.{_nearest(name, TEMPLATES)} Write a name that stands in "
            "docs/templates.md, or remove template: then the tokenizer's own chat template is "
            "used.",
        )


def tool_format_is_known(arguments: RunArguments) -> Iterator[Problem]:
    """A tool format is one of the table."""
    name = arguments.data.tool_format
    if name is not None and name not in TOOL_FORMATS:
        yield Problem(
            ("tool_format",),
            f"tool_format={name} is not known.{_nearest(name, TOOL_FORMATS)} Write one of "
            f"{', '.join(TOOL_FORMATS)}, or remove it.",
        )


def tool_format_has_a_template(arguments: RunArguments) -> Iterator[Problem]:
    """The tokenizer's own chat template has its own text for tools."""
    data = arguments.data
    if data.tool_format is not None and data.template is None:
        yield Problem(
            ("tool_format", "template"),
            f"tool_format={data.tool_format} without template: the tokenizer's own chat template "
            "has its own text for tools. Write template, or remove tool_format.",
        )


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


TEMPLATE_RULES: tuple[Rule, ...] = (
    template_is_known,
    tool_format_is_known,
    tool_format_has_a_template,
)
