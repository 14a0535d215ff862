"""Completion as bash itself computes it: its function is run on a line, its replies are read."""

import shutil
import subprocess
from pathlib import Path

import pytest

from llmray import cli, completion
from llmray.arguments.run import FIELDS

USAGES = {name: command.usage for name, command in cli.COMMANDS.items()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The replies of bash to a line whose end is where the cursor stands."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "myruns").mkdir()
    for name in ("myruns/a.yaml", "myruns/b.json", "myruns/c.txt", "my.yaml"):
        (folder / name).write_text("")
    (folder / "script").write_text(completion.script("bash", USAGES))
    ask = 'COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=(); _llmray; printf "%s\\n" "${COMPREPLY[@]}"'

    def replies(line: str) -> list[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", f"source ./script; {ask}", "bash", line],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert not done.stderr
        return done.stdout.splitlines()

    return replies


def test_commands(complete):
    assert complete("llmray ") == [f"{name} " for name in cli.COMMANDS]
    assert complete("llmray tra") == ["train "]


def test_keys_wait_for_their_value(complete):
    offered = complete("llmray train ")
    assert {f"{key}=" for key in FIELDS} <= set(offered)
    assert complete("llmray train my.yaml lora_dr") == ["lora_dropout="]
    assert complete("llmray train my.yaml --lora_dr") == ["--lora_dropout "]


@pytest.mark.parametrize("before", ["bf16=", "--bf16=", "--bf16 "])
def test_choices(complete, before):
    assert complete(f"llmray train my.yaml {before}") == ["true ", "false "]
    assert complete(f"llmray train my.yaml {before}f") == ["false "]


def test_templates_are_choices(complete):
    assert sorted(complete("llmray train template=sm")) == ["smollm ", "smollm2 "]


def test_run_files_and_folders(complete):
    assert sorted(complete("llmray train my")) == ["my.yaml ", "myruns/"]
    assert sorted(complete("llmray train myruns/")) == ["myruns/a.yaml ", "myruns/b.json "]
    assert complete("llmray train dataset_dir=myr") == ["myruns/"]


def test_options_and_keys_as_words(complete):
    assert "--rows " in complete("llmray render --ro")
    assert complete("llmray check my.yaml --explain lora_dr") == ["lora_dropout "]
    assert complete("llmray args lora_dr") == ["lora_dropout "]
    assert complete("llmray completion ") == ["bash ", "zsh ", "fish "]


def test_a_word_with_a_star_is_not_expanded(complete):
    assert complete("llmray train * lora_dr") == ["lora_dropout="]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ("train [RUN.yaml] [key=value | --key value ...]", completion.Takes((), ("runs",))),
        ("args [--json-schema] [KEY ...]", completion.Takes(("--json-schema",), ("keys",))),
        ("plot DIR ... [--out FILE]", completion.Takes(("--out",), ("folders",))),
        ("completion bash|zsh|fish", completion.Takes(("bash", "zsh", "fish"), ())),
        (
            "check [RUN.yaml] [key=value | --key value ...] [--explain KEY]",
            completion.Takes(("--explain",), ("runs",)),
        ),
    ],
)
def test_what_a_command_takes_is_read_from_its_usage(usage, expected):
    assert completion.takes(usage) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_hold_every_command_and_key(shell, tmp_path: Path):
    text = completion.script(shell, USAGES)
    assert set(FIELDS) | set(USAGES) <= set(text.replace('"', " ").split())
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_the_command(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef llmray\n")
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
    assert cli.main(["completion"]) == 2
