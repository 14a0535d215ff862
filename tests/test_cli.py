import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import llmray
from llmray import cli, launch
from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError, ClusterError

RUN = """
model_name_or_path: some/model
stage: sft
finetuning_type: lora
do_train: true
dataset: demo_persona
dataset_dir: data
template: smollm2
output_dir: saves/x
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch):
    """Takes away the log handler that a command installs: it holds this test's stderr."""
    for name in ("USE_RAY", "RANK", "WORLD_SIZE", "LLMRAY_HOME", "LLMRAY_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    yield
    cli.log.handlers.clear()
    cli.log.propagate = True
    cli.log.setLevel(logging.NOTSET)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch):
    """Puts a function in place of the command `version`."""

    def install(function):
        monkeypatch.setitem(cli.COMMANDS, "version", cli.Command(function, "version", ""))

    return install


def raising(error: BaseException):
    def command(words: list[str]) -> int:
        raise error

    return command


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: llmray {name}")


def test_no_words_is_an_error_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["run.yaml"], "llmray train run.yaml"),
        (["zzz"], "There are train, check"),
        (["check"], "No run file was given"),
        (["version", "now"], "takes no words"),
        (["tune"], "has no section tune"),
        (["tune", "model_name_or_path=m", "resume=perhaps"], "true or false is required"),
    ],
)
def test_wrong_command_lines_are_explained(
    words: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert advice in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ClusterError("needs 8 GPU, the cluster has 4"), 1, "error: needs 8 GPU"),
        (ArgumentsError("lora_rank=0 is too small"), 2, "error: lora_rank=0"),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd\nThis was not expected"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_message_and_a_code(
    error: BaseException,
    code: int,
    text: str,
    fake_command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLMRAY_DEBUG", raising=False)
    fake_command(raising(error))
    assert cli.main(["version"]) == code
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(
    fake_command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMRAY_DEBUG", "1")
    fake_command(raising(RuntimeError("odd")))
    assert cli.main(["version"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_leave_argument_errors_to_the_first(
    fake_command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    fake_command(raising(ArgumentsError("wrong")))
    assert cli.main(["version"]) == 2
    assert not capsys.readouterr().err
    fake_command(raising(ClusterError("lost")))
    assert cli.main(["version"]) == 1
    assert capsys.readouterr().err == "rank 1: error: lost\n"


def test_check_says_what_the_run_will_be(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(run_file), "stage=pt", "--lora_rank", "4"]) == 0
    assert "pt, lora, without Ray" in capsys.readouterr().out


def test_check_reports_all_problems_at_once(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", str(run_file), "learning_rte=1e-4", "lora_rank=zero", "cutoff_len=-1"]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "learning_rate" in err
    assert "lora_rank" in err
    assert "cutoff_len" in err


def test_the_words_alone_are_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = [line.replace(": ", "=") for line in RUN.strip().splitlines()]
    assert cli.main(["check", *words]) == 0
    assert "some/model" in capsys.readouterr().out


def test_a_missing_run_file_is_an_arguments_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_args_describes_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["args", "lora_rank"]) == 0
    out = capsys.readouterr().out
    assert "lora_rank" in out
    assert "8" in out
    assert "cutoff_len" not in out


def test_args_with_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["args", "lora_rnk"]) == 2
    assert "lora_rank" in capsys.readouterr().err


def test_unknown_verbosity_is_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "LOUD")
    assert cli.main(["check", str(run_file)]) == 2
    assert "LOUD" in capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunArguments]:
    """Stands in for training; holds what it was called with."""
    calls: list[RunArguments] = []
    fake = ModuleType("llmray.local")
    fake.train = lambda arguments: calls.append(arguments) or 143
    monkeypatch.setitem(sys.modules, "llmray.local", fake)
    monkeypatch.setattr(llmray, "local", fake, raising=False)
    monkeypatch.setattr(launch, "_visible_gpus", lambda: 0)
    return calls


@pytest.mark.parametrize(
    ("environ", "base"),
    [
        ({}, "work"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "user/llmray"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "LLMRAY_HOME": "home"}, "home"),
    ],
)
def test_relative_paths_are_made_absolute_and_said(
    environ: dict[str, str],
    base: str,
    run_file: Path,
    tmp_path: Path,
    trained: list[RunArguments],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name, value in environ.items():
        monkeypatch.setenv(name, str(tmp_path / value) if name == "LLMRAY_HOME" else value)
    assert cli.main(["train", str(run_file)]) == 143
    [arguments] = trained
    assert arguments.training.output_dir == str(tmp_path / base / "saves" / "x")
    said = capsys.readouterr().err
    assert f"relative paths start from {tmp_path / base}\n" in said
    assert ("RAY_JOB_STOP_WAIT_TIME_S" in said) == bool(environ)


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m llmray args | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_plot_writes_one_picture_of_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        line = '{"current_steps": 1, "loss": 1.0, "rewards/margins": 2}\n'
        (tmp_path / name / "trainer_log.jsonl").write_text(line)
    assert cli.main(["plot", "one", "two"]) == 0
    assert cli.main(["plot", "one", "two", "--key", "rewards/margins"]) == 0
    assert cli.main(["plot", "one", "--out", "new/picture.pdf"]) == 0
    pictures = ["runs_loss.png", "runs_rewards_margins.png", "new/picture.pdf"]
    assert capsys.readouterr().out.split() == pictures
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures)
    assert cli.main(["plot", "one", "three"]) == 2
    assert "three does not exist" in capsys.readouterr().err


def test_a_tracker_that_cannot_be_used_is_said_before_anything_is_loaded(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(run_file.parent))
    assert cli.main(["train", str(run_file), "report_to=wandb"]) == 2
    assert "wandb has no key for its service. Set WANDB_API_KEY" in capsys.readouterr().err
    assert cli.main(["check", str(run_file), "report_to=wnadb"]) == 2
    assert "Did you mean wandb?" in capsys.readouterr().err


def test_a_stream_is_not_prepared(run_file: Path) -> None:
    words = ["prepare", str(run_file), "streaming=true", "max_steps=4"]
    assert cli.main(words) == 2


SECTION = """
val_size: 4
eval_strategy: steps
max_steps: 10
tune:
  search:
    lora_rank: {grid: [4, 8]}
"""


def test_a_sweep_is_told_before_it_starts(
    run_file: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(RUN + SECTION)
    data = Path(__file__).parents[1] / "data"
    words = [str(run_file), f"model_name_or_path={tiny_llama_dir}", f"dataset_dir={data}"]
    assert cli.main(["tune", *words, "--dry-run", "tune.max_concurrent=2"]) == 0
    said = capsys.readouterr().out
    assert "2 trials, searcher grid" in said
    assert "2 trials at a time" in said
    assert "20 of all trials together" in said
    assert not Path("saves/x").exists()


def test_a_run_file_with_a_sweep_is_not_trained_once(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(RUN + SECTION)
    assert cli.main(["train", str(run_file)]) == 2
    assert "Sweep with `llmray tune`" in capsys.readouterr().err
