"""The tokens of a run: a model's own tokenizer, and what the keys of the run add to it.

How the rows of the embedding begin that added tokens need is for `model.embedding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmray.arguments import reading
from llmray.errors import ArgumentsError, ModelError
from llmray.model_code import optional_imports

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmray.arguments.model import ModelArguments

log = getLogger("llmray")

FORM = 'Required: lines of `"<token>": a text that describes it`'


@dataclass(frozen=True)
class Additions:
    """The tokens that a run adds: ordinary ones, special ones, and texts that describe them."""

    ordinary: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[str, ...]:
        """All of them, in the order in which they get their ids."""
        return (*self.ordinary, *self.special)


@dataclass(frozen=True)
class Extended:
    """A tokenizer with the tokens of a run.

    `added` holds the ids of those that the model's own tokenizer lacks; that knows `num_known`
    ids. `num_ids` is one more than the largest id.
    """

    tokenizer: PreTrainedTokenizerBase
    added: dict[str, int]
    num_known: int
    num_ids: int


def additions(model_args: ModelArguments) -> Additions:
    """The tokens that a run's keys name.

    Raises:
        ArgumentsError: a token is named as ordinary and as special, or the file of
            new_special_tokens_config is missing or malformed.
    """
    descriptions = _descriptions(model_args.new_special_tokens_config)
    special = tuple(dict.fromkeys([*model_args.add_special_tokens, *descriptions]))
    ordinary = tuple(dict.fromkeys(model_args.add_tokens))
    both = sorted({*ordinary} & {*special})
    if both:
        raise ArgumentsError(
            f"add_tokens={','.join(ordinary)} holds {', '.join(both)}, also named as special. A "
            "token is one or the other: remove it from add_tokens."
        )
    return Additions(ordinary, special, descriptions)


def load(model_dir: Path | str, model_args: ModelArguments) -> Extended:
    """The tokenizer in a model's folder with the run's tokens; it pads on the right.

    Raises:
        ModelError: there is no tokenizer that can be loaded.
        ArgumentsError: as `additions`.
    """
    tokenizer = _own(model_dir, model_args)
    asked = additions(model_args)
    known = tokenizer.get_vocab()
    num_known = max(known.values()) + 1
    tokenizer.add_tokens(list(asked.ordinary), special_tokens=False)
    tokenizer.add_tokens(list(asked.special), special_tokens=True)
    ids = tokenizer.get_vocab()
    added = {token: ids[token] for token in asked.tokens if token not in known}
    stated = model_args.model_max_length
    if stated is not None and tokenizer.model_max_length < stated:
        tokenizer.model_max_length = stated
    return Extended(tokenizer, added, num_known, max(ids.values()) + 1)


def _own(model_dir: Path | str, model_args: ModelArguments) -> Any:
    from transformers import AutoTokenizer

    try:
        with optional_imports():
            return AutoTokenizer.from_pretrained(
                str(model_dir),
                trust_remote_code=model_args.trust_remote_code,
                padding_side="right",
            )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{model_dir} has no tokenizer that can be loaded: {error}. Required: the files of a "
            "tokenizer (tokenizer.json, tokenizer_config.json) beside the model's."
        ) from error


def _descriptions(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        found, problems = reading.read(Path(path))
    except ArgumentsError as error:
        raise ArgumentsError(
            f"new_special_tokens_config={path} cannot be used: {error} {FORM}."
        ) from None
    if problems:
        raise ArgumentsError(f"new_special_tokens_config={path}: {problems[0].text}")
    if not found:
        raise ArgumentsError(f"new_special_tokens_config={path} is empty. {FORM}.")
    for token, text in found.items():
        if not token.strip() or not isinstance(text, str) or not text.strip():
            raise ArgumentsError(
                f"new_special_tokens_config={path}: the description of {token!r} is {text!r}. "
                f"{FORM}; mend that line."
            )
    return found
