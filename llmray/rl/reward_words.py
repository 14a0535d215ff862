"""In which words a reward model reads an answer: the policy's own text, or its own template.

A score is worth something only in the format that the model was trained in. That stands in the
run file beside it, in its tokenizer's chat template, or is the policy's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

import yaml

from llmray import hub
from llmray.arguments.loading import replace
from llmray.arguments.run import RunArguments
from llmray.data.tokenizer import load_tokenizer, tokenizer_json
from llmray.errors import RewardError
from llmray.model.classifier import is_classifier
from llmray.model.load import load_config

log = getLogger("llmray")

RUN_FILE = "run_arguments.yaml"

Words = Literal["text", "conversation"]


@dataclass(frozen=True)
class Known:
    """What is known of a reward model.

    Attributes:
        run_file: that of its training, None where it has none; the template stands there.
        is_classifier: of a hub, not trained here.
        shares_tokenizer: its tokenizer is the policy's by content.
        has_chat_template: in its tokenizer.
    """

    run_file: dict[str, Any] | None
    is_classifier: bool
    shares_tokenizer: bool
    has_chat_template: bool


def choose(known: Known, policy_template: str | None) -> tuple[Words, str | None] | None:
    """How a reward model reads answers, and its template by name, None for its tokenizer's own.

    Args:
        known: of the model.
        policy_template: the run's.

    Returns: None where nothing says what words it knows.
    """
    if known.run_file is not None:
        named = known.run_file.get("template")
        is_equal = named == policy_template and known.shares_tokenizer
        return ("text" if is_equal else "conversation"), named
    if known.shares_tokenizer and not known.is_classifier:
        return "text", policy_template
    if known.has_chat_template:
        return "conversation", None
    return ("text", policy_template) if known.shares_tokenizer else None


def fitted(
    asked: RunArguments, policy: RunArguments, policy_dir: Path
) -> tuple[RunArguments, Words]:
    """The run file of a reward model with its template, and how it reads answers.

    Args:
        asked: the run file that `llmray score` would have for it.
        policy: the run.
        policy_dir: the policy's folder.

    Raises:
        RewardError: nothing says what words it knows.
        LlmrayError: its files are missing or damaged.
    """
    model_dir = hub.resolve(asked.model.model_name_or_path, asked.model)
    adapters = asked.model.adapter_name_or_path
    place = hub.resolve(adapters[-1], asked.model, kind="adapter") if adapters else model_dir
    theirs = load_tokenizer(model_dir, asked.model)
    # also of one folder: each may add tokens of its own
    ours = load_tokenizer(policy_dir, policy.model)
    known = Known(
        run_file=_run_file(place),
        is_classifier=is_classifier(load_config(model_dir, asked.model)),
        shares_tokenizer=_content(theirs) == _content(ours),
        has_chat_template=bool(theirs.chat_template),
    )
    found = choose(known, policy.data.template)
    if found is None:
        raise RewardError(
            f"reward_model={place}: its tokenizer is not the policy's and has no chat template, "
            f"and there is no {RUN_FILE} that names its template. What it was trained to read is "
            "required. Put its chat template beside it (chat_template.jinja), or the run file of "
            "its training, or take a reward model with the policy's tokenizer."
        )
    words, template = found
    if words == "text":
        return asked, words
    own = "its tokenizer's own chat template" if template is None else f"template {template}"
    log.info("reward_model=%s reads conversations in %s", place, own)
    kept = {"template": template, "default_system": policy.data.default_system}
    return replace(asked, **kept), words


def _run_file(place: Path) -> dict[str, Any] | None:
    path = place / RUN_FILE
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RewardError(
            f"{path} cannot be read: {' '.join(str(error).split())}. The run file of a reward "
            "model says its template. Mend it, or take it out."
        ) from error
    return found if isinstance(found, dict) else {}


def _content(tokenizer: Any) -> dict[str, Any]:
    """What makes tokens of text, without how rows are padded and cut."""
    whole = json.loads(tokenizer_json(tokenizer))
    return {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
