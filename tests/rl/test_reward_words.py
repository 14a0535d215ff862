"""In which words a reward model reads answers, by what is known of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer

from llmray.arguments.loading import load
from llmray.errors import RewardError
from llmray.rl.reward_words import Known, choose, fitted


@pytest.mark.parametrize(
    ("run_file", "is_classifier", "shares", "has_own", "expected"),
    [
        ({"template": "chatml"}, False, True, True, ("text", "chatml")),
        ({"template": "chatml"}, False, False, True, ("conversation", "chatml")),
        ({"template": "llama3"}, False, True, True, ("conversation", "llama3")),
        ({}, False, True, True, ("conversation", None)),
        (None, False, True, True, ("text", "chatml")),
        (None, False, True, False, ("text", "chatml")),
        (None, False, False, True, ("conversation", None)),
        (None, False, False, False, None),
        (None, True, True, True, ("conversation", None)),
        (None, True, True, False, ("text", "chatml")),
        (None, True, False, True, ("conversation", None)),
    ],
)
def test_choice(run_file, is_classifier, shares, has_own, expected):
    assert choose(Known(run_file, is_classifier, shares, has_own), "chatml") == expected


def test_a_chat_template_that_policy_and_reward_model_share_is_text():
    assert choose(Known({}, False, True, True), None) == ("text", None)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("words") / "policy"
    make_tokenizer(root)
    return make_model(root)


def asked(model: Path, template: str | None = "chatml", **keys):
    named = {} if template is None else {"template": template}
    return load({"stage": "rm", "model_name_or_path": str(model), **named, **keys}, environ={})


def test_a_tokenizer_of_equal_content_is_shared(policy, tmp_path):
    make_tokenizer(tmp_path)
    make_model(tmp_path)
    found, words = fitted(asked(tmp_path), asked(policy), policy)
    assert (words, found.data.template) == ("text", "chatml")


def test_tokens_that_the_run_adds_make_another_tokenizer_of_the_same_files(policy):
    """A whole reward model that is the policy's own folder has its tokens alone."""
    run = asked(policy, add_special_tokens="<a>")
    assert fitted(asked(policy), run, policy)[1] == "conversation"
    assert fitted(asked(policy, add_special_tokens="<a>"), run, policy)[1] == "text"


def other(folder: Path, *, has_template: bool) -> Path:
    tokenizer = make_tokenizer(folder)
    tokenizer.add_tokens(["wug"])
    tokenizer.save_pretrained(folder)
    if not has_template:
        (folder / "chat_template.jinja").unlink()
    return make_model(folder, vocab_size=330)


def test_another_tokenizer_needs_a_template_that_is_known(policy, tmp_path):
    run = asked(policy, default_system="Be short.")
    found, words = fitted(asked(other(tmp_path / "one", has_template=True)), run, policy)
    assert (words, found.data.template) == ("conversation", None)
    assert found.data.default_system == "Be short."
    bare = other(tmp_path / "two", has_template=False)
    with pytest.raises(RewardError, match=r"is not the policy's and has no chat template.*Put its"):
        fitted(asked(bare), run, policy)
    (bare / "run_arguments.yaml").write_text("template: llama3\n")
    found, words = fitted(asked(bare), run, policy)
    assert (words, found.data.template) == ("conversation", "llama3")
    (bare / "run_arguments.yaml").write_text("template: [")
    with pytest.raises(RewardError, match=r"run_arguments.yaml cannot be read.*Mend it"):
        fitted(asked(bare), run, policy)
