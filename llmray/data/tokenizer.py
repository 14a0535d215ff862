"""The tokenizer of a model: loaded with the run's arguments, and fitted to a named template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmray import vocabulary
from llmray.data import templates
from llmray.data.chat_template import ChatTemplateRenderer
from llmray.data.conversation import RowError
from llmray.data.plain_text import PlainText
from llmray.data.template_jinja import as_jinja
from llmray.data.templates import Renderer, Template
from llmray.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmray.arguments.data import DataArguments
    from llmray.arguments.model import ModelArguments


NAME_ONE = "Name a template: docs/templates.md lists them by model, for instance template: qwen3."


def load_tokenizer(
    model_dir: Path | str, model_args: ModelArguments, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; it pads on the right, with the end token if it must.

    Args:
        model_dir: the folder of the model.
        model_args: trust_remote_code, and the tokens that the run adds.
        template: a named template to `fit` the tokenizer to.

    Raises:
        ModelError: there is no tokenizer, or one without an end-of-text token.
        ArgumentsError: the keys of added tokens are wrong.
        DataError: no such template.
    """
    tokenizer = vocabulary.load(model_dir, model_args).tokenizer
    if template is not None:
        fit(tokenizer, templates.find(template))
    if tokenizer.eos_token is None:
        raise ModelError(
            f"The tokenizer in {model_dir} has no end-of-text token. Required: eos_token in its "
            "tokenizer_config.json; add it."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # targets go by position, so this masks nothing
    return tokenizer


def fit(tokenizer: Any, template: Template) -> None:
    """Make a tokenizer end responses as a template does, and write its text if it writes none.

    The template's end of turn becomes the end-of-text token where it is one token; a tokenizer
    without a chat template gets the template as its own.
    """
    end = template.end_of_turn
    if end and is_one_token(tokenizer, end):
        tokenizer.eos_token = end
    if not tokenizer.chat_template:
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        tokenizer.chat_template = as_jinja(template, bos, eos)


def is_one_token(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer knows a text as a single token."""
    return len(tokenizer.encode(text, add_special_tokens=False)) == 1


def around_text(
    tokenizer: Any, template: Template | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after each text of stage pt.

    Before: the begin token, of tokenizers that put it before a text. After: the template's end of
    text where the tokenizer has it, else its own end token.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a", add_special_tokens=True)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and framed[:1] == [bos] and plain[:1] != [bos]
    end = template.end_of_text if template is not None else ""
    if end and is_one_token(tokenizer, end):
        after = tokenizer.encode(end, add_special_tokens=False)[0]
    else:
        after = tokenizer.eos_token_id
    return ((bos,) if adds_bos else ()), (after,)


def renderer(data_args: DataArguments, tokenizer: Any) -> Renderer:
    """What turns the conversations of a run into text.

    Raises:
        DataError: no such template, or none is named and the tokenizer's own cannot be used.
    """
    if data_args.template is not None:
        template = templates.find(data_args.template)
        return templates.for_tokenizer(template, tokenizer, data_args)
    if not tokenizer.chat_template:
        raise DataError(
            f"template is not given, and the tokenizer has no chat template of its own. {NAME_ONE}"
        )
    own = ChatTemplateRenderer(
        tokenizer.get_chat_template(),
        dict(tokenizer.special_tokens_map),
        data_args.default_system,
        switches(tokenizer.get_chat_template(), data_args),
    )
    try:
        own.check()
    except RowError as error:
        raise DataError(f"template is not given, and {error} {NAME_ONE}") from error
    return own


def switches(chat_template: str, data_args: DataArguments) -> dict[str, bool]:
    """What a tokenizer's own chat template is told of thoughts.

    Raises:
        DataError: it cannot be told what the run asks for.
    """
    told: dict[str, bool] = {}
    has_thoughts = "think" in chat_template
    if data_args.tool_format is not None:
        raise DataError(
            f"tool_format={data_args.tool_format} needs a template by name: the tokenizer's own "
            f"chat template has its own text for tools. {NAME_ONE} Or remove tool_format."
        )
    if data_args.enable_thinking is not None and "enable_thinking" in chat_template:
        told["enable_thinking"] = data_args.enable_thinking
    elif data_args.enable_thinking is False and has_thoughts:
        raise DataError(
            "enable_thinking=false, and the tokenizer's own chat template has no switch for it. "
            f"{NAME_ONE} Or remove enable_thinking."
        )
    if data_args.preserve_thinking and has_thoughts:
        if "clear_thinking" in chat_template:
            told["clear_thinking"] = False
        elif "preserve_thinking" in chat_template:
            told["preserve_thinking"] = True
        else:
            raise DataError(
                "preserve_thinking=true, and the tokenizer's own chat template has no switch for "
                f"it. {NAME_ONE} Or remove preserve_thinking."
            )
    return told


def tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as the text of a tokenizer.json, which processes without transformers read.

    Raises:
        ModelError: the tokenizer is Python code alone.
    """
    if not getattr(tokenizer, "is_fast", False):  # transformers 5: false for remote code
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json form, which preparing data requires."
            " Convert the model's tokenizer to one."
        )
    return str(tokenizer.backend_tokenizer.to_str())


def plain_text(tokenizer: Any, model_args: ModelArguments) -> PlainText | None:
    """The special tokens that are plain text where they stand in the data; None for none.

    Raises:
        ModelError: as `tokenizer_json`.
    """
    if not model_args.split_special_tokens:
        return None
    return PlainText.of(tokenizer_json(tokenizer))
