"""One key explained, in a run and without; what is said to follow is what the code makes of it."""

import pytest

from llmray import cli
from llmray.arguments.derivations import DERIVATIONS, DERIVED
from llmray.arguments.explain import explain
from llmray.arguments.loading import load
from llmray.arguments.run import DEFAULTS, FIELDS
from llmray.errors import ArgumentsError

RUN = """
model_name_or_path: m
dataset: a
output_dir: saves/mine
lora_rank: 16
use_cache: true
gradient_checkpointing: false
hf_hub_token: very-secret
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def line(key, source=None, *words, environ=None):
    """What is said of the key's value in the run."""
    text = explain(key, source, words, environ=environ or {}).text
    return next(line for line in text.splitlines() if "in this run" in line).strip()


def test_without_a_run_the_key_alone_is_explained():
    text = explain("lora_rank", environ={}).text
    assert "Rank of the adapter" in text
    assert "takes: a whole number, at least 1" in text
    assert "default: 8" in text
    assert "derives: lora_alpha where that is not given: twice lora_rank" in text
    assert "in this run" not in text


def test_where_a_value_came_from(run_file):
    assert line("lora_rank", run_file) == f"in this run: 16, in {run_file}"
    assert line("lora_rank", run_file, "lora_rank=4") == (
        f"in this run: 4, on the command line, over 16 in {run_file}"
    )
    assert line("lora_rank", None, "model_name_or_path=m", "--lora_rank", "8") == (
        "in this run: 8, on the command line, which is the default"
    )
    assert line("cutoff_len", run_file) == "in this run: 2048, the default"
    assert line("max_samples", run_file) == "in this run: not given"
    assert line("lora_alpha", run_file) == "in this run: 32, derived: twice lora_rank"
    assert line("bf16", run_file).startswith("in this run: not given: chosen where the run starts")
    assert line("use_ray", run_file, environ={"USE_RAY": "1"}) == (
        "in this run: true, in the environment, as USE_RAY"
    )


def test_other_names_of_a_key(run_file):
    assert line("use_kv_cache", run_file).startswith(
        f"in this run: true, in {run_file}, as use_cache"
    )
    assert line("disable_gradient_checkpointing", run_file) == (
        f"in this run: true, in {run_file}, as gradient_checkpointing"
    )
    assert "no longer a key" in explain("save_safetensors", run_file, environ={}).text


def test_what_follows_from_a_key(run_file):
    assert "derives: lora_alpha: 32, derived: twice" in explain("lora_rank", run_file).text
    given = explain("lora_rank", run_file, ["lora_alpha=5"]).text
    assert "derives: nothing for lora_alpha, given as 5" in given


def test_keys_that_are_hidden(run_file):
    text = explain("hf_hub_token", run_file, ["hf_hub_token=other-secret"], environ={}).text
    assert "-secret" not in text
    assert text.count("(hidden)") == 2


def test_a_key_of_a_wrong_run_is_explained_before_the_problems(run_file, capsys, own_console):
    assert cli.main(["check", str(run_file), "lora_rank=none", "--explain", "lora_rank"]) == 2
    said = capsys.readouterr()
    assert "Rank of the adapter" in said.out
    assert "in this run: none, on the command line" in said.out
    assert "lora_rank=none is wrong" in said.err


def test_an_unknown_key_is_refused():
    with pytest.raises(ArgumentsError, match="Did you mean lora_rank"):
        explain("lora_rnk", environ={})


def test_derivations_are_of_keys_that_may_be_left_out():
    assert len(DERIVED) == len(DERIVATIONS)
    for row in DERIVATIONS:
        assert DEFAULTS[row.key] is None
        assert set(row.sources) <= set(FIELDS) - {row.key}


BASE = {"model_name_or_path": "m", "dataset": "a", "output_dir": "saves/mine"}


def used(key, arguments, patch):
    """What the code makes of the key where it is not given."""
    if key == "lora_alpha":
        from peft import LoraConfig
        from tiny import build_model

        from llmray.model import tuning

        tuned = tuning.apply(build_model(), arguments, is_trainable=True, upcast=False)
        config: LoraConfig = tuned.peft_config["default"]
        return config.lora_alpha
    if key == "eval_steps":
        from llmray.train.loop import cadence

        options = arguments.training.model_copy(update={"eval_strategy": "steps"})
        return cadence(options, 1000).eval_steps
    if key == "ray_run_name":
        from llmray.orchestration.train_job import run_directory

        return run_directory(arguments).rsplit("/", 1)[1]
    assert key == "packing"
    from llmray.data.identity import describe

    patch.setattr("llmray.data.identity._tokenizer", lambda *_: {})
    return describe(arguments, None, [], [], None).get("packing", False)


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("lora_alpha", {"lora_rank": 3}),
        ("eval_steps", {"logging_steps": 7}),
        ("ray_run_name", {}),
        ("packing", {"stage": "pt"}),
        ("packing", {"stage": "sft"}),
    ],
)
def test_what_is_said_to_follow_is_what_the_code_does(key, keys, monkeypatch):
    arguments = load(BASE | keys, environ={})
    said = DERIVED[key].value(arguments)
    assert said == used(key, arguments, monkeypatch)
    assert said is not None
