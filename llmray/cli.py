"""The command line: `llmray COMMAND …` looks a command up and runs it.

Every import of weight stands inside the command that needs it, so that `--help` and mistakes in a
run file answer at once. This is also the one place where an error becomes a message and an exit
code: 0 done, 1 failed, 2 the command line or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from llmray.errors import ArgumentsError, LlmrayError
from llmray.usage import (
    CHAT_HELP,
    CHECK_HELP,
    COMPLETION_HELP,
    EXPORT_HELP,
    PLOT_HELP,
    RENDER_HELP,
    RUN_FILE_HELP,
    SCORE_HELP,
    SERVER_HELP,
    TUNE_HELP,
)

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = logging.getLogger("llmray")


class Command(NamedTuple):
    """A row of the command table; `run` gets the words after the command's name."""

    run: Callable[[list[str]], int]
    usage: str
    summary: str
    details: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (the process's own by default) names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except LlmrayError as error:
        return _failed(error, str(error), error.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`llmray args | head`): nothing to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # process boundary: a defect of llmray or of a library
        text = f"{type(error).__name__}: {error}".strip().rstrip(":")
        hint = "This was not expected; LLMRAY_DEBUG=1 shows where it came from."
        return _failed(error, f"{text}\n{hint}", 1)


def _dispatch(words: list[str]) -> int:
    parser = _top_parser()
    if not words or words[0] in ("-h", "--help"):
        parser.print_help(sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name, rest = ("version" if words[0] in ("-V", "--version") else words[0]), words[1:]
    if name not in COMMANDS:
        raise ArgumentsError(_unknown_command(name))
    if rest and rest[0] in ("-h", "--help"):
        command = COMMANDS[name]
        print(f"usage: llmray {command.usage}\n\n{command.summary}\n{command.details}")
        return 0
    return COMMANDS[name].run(rest)


def check(words: list[str]) -> int:
    """Say every problem of a run file at once, or what the run will be; or explain one key."""
    _speak()
    parser = argparse.ArgumentParser(prog="llmray check", add_help=False, allow_abbrev=False)
    parser.add_argument("--explain", metavar="KEY")
    options, rest = parser.parse_known_args(words)
    if options.explain is not None:
        return _explain(options.explain, rest)
    arguments = _load(rest)
    print(_summary(arguments))
    return 0


def _explain(key: str, words: list[str]) -> int:
    from llmray.arguments import explain

    explanation = explain.explain(key, *_file_and_words(words))
    print(explanation.text, flush=True)
    if explanation.error is not None:
        raise explanation.error
    return 0


def train(words: list[str]) -> int:
    """Train or evaluate as the run file says: on Ray, under torchrun, or in this process."""
    _speak()
    from llmray.arguments.sweep_file import refuse_section

    arguments = _with_absolute_paths(_load(words))
    refuse_section(arguments)
    asked = arguments.training
    if not (asked.do_train or asked.do_eval or asked.do_predict):
        raise ArgumentsError(
            "do_train, do_eval and do_predict are false: there is nothing to do. Set one of them "
            "to true."
        )
    _before_training(arguments)
    from llmray import launch

    ranks = launch.plan(arguments.ray_enabled, os.environ, use_cpu=arguments.training.use_cpu)
    if ranks is not None:
        return launch.torchrun(ranks, ["-m", "llmray", "train", *words])
    if arguments.ray_enabled:
        from llmray.orchestration import train_job

        return train_job.train(arguments)
    from llmray import local

    return local.train(arguments)


def tune(words: list[str]) -> int:
    """Run a sweep: trials of the run file that differ in the keys of its section `tune`."""
    _speak()
    from llmray.arguments.sweep_file import load_sweep

    asked = load_sweep(words)
    arguments = _with_absolute_paths(asked.arguments)
    if asked.is_dry:
        from llmray.sweep import dry_run

        return dry_run.show(arguments)
    _before_training(arguments)
    from llmray.orchestration import tune_job

    return tune_job.tune(arguments, resumes=asked.resumes)


def prepare(words: list[str]) -> int:
    """Build the run's prepared data and say what it holds; or list and remove what is kept."""
    _speak()
    if words and words[0] in ("--list", "--remove"):
        from llmray import preparation

        return preparation.manage(words[0], words[1:])
    arguments = _with_absolute_paths(_load(words))
    if arguments.data.streaming:
        raise ArgumentsError(
            "streaming=true reads the data while training: there is nothing to prepare. Write "
            "streaming: false, or train."
        )
    from llmray import preparation

    started = perf_counter()
    if arguments.ray_enabled:
        from llmray.orchestration import train_job

        ref = train_job.prepare(arguments)
        if isinstance(ref, int):
            return ref
    else:
        ref = preparation.prepare(arguments)
    print(preparation.report(ref, perf_counter() - started))
    return 0


def chat(words: list[str]) -> int:
    """Talk in the terminal to the run's model, with its adapter where one is named."""
    _speak()
    arguments = _with_absolute_paths(_load(words))
    from llmray.serve import chat as terminal

    return terminal.chat(arguments)


def export(words: list[str]) -> int:
    """Write the run's model with its adapters merged, as others read it."""
    _speak()
    arguments = _with_absolute_paths(_load(words))
    from llmray import export as exporting

    print(exporting.export(arguments))
    return 0


def plot(words: list[str]) -> int:
    """Draw one logged key of several runs in one picture."""
    parser = argparse.ArgumentParser(prog="llmray plot", description=plot.__doc__)
    parser.add_argument("--key", default="loss", help="key of trainer_log.jsonl (loss)")
    parser.add_argument("--out", type=Path, help="picture: .png, .svg or .pdf (runs_<key>.png)")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="output_dir of a run")
    options = parser.parse_args(words)
    from llmray.train import plots

    curves = plots.read_curves(options.directories, options.key)
    out = options.out or Path(plots.file_name(options.key, "runs"))
    plots.draw_runs(curves, options.key, out)
    print(out)
    return 0


def render(words: list[str]) -> int:
    """Show rows of the run's data as the model will see them."""
    _speak()
    parser = argparse.ArgumentParser(
        prog="llmray render", description=render.__doc__, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--ids", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(words)
    if options.rows < 1:
        raise ArgumentsError(f"--rows {options.rows}: at least 1 is required. Leave it out for 3.")
    arguments = _with_absolute_paths(_load(rest))
    from llmray import render as rows

    table = "eval" if options.eval else "train"
    return rows.render(arguments, rows.Options(options.rows, table, options.ids, options.json))


def score(words: list[str]) -> int:
    """Write the rewards of a data set, or of lines of JSON, by the run's reward model."""
    _speak()
    parser = argparse.ArgumentParser(prog="llmray score", add_help=False, allow_abbrev=False)
    parser.add_argument("--input")
    parser.add_argument("--eval", action="store_true")
    options, rest = parser.parse_known_args(words)
    arguments = _with_absolute_paths(_load(rest))
    from llmray import scoring

    table = "eval" if options.eval else "train"
    return scoring.score(arguments, scoring.Options(table, options.input))


def reward_server(words: list[str]) -> int:
    """Answer requests for rewards over HTTP, by the run's reward model."""
    _speak()
    parser = argparse.ArgumentParser(
        prog="llmray reward-server", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--token-file", type=Path)
    options, rest = parser.parse_known_args(words)
    arguments = _with_absolute_paths(_load(rest))
    from llmray import serve
    from llmray.arguments import environment

    host, port, token = environment.api(os.environ)
    serve.require_packages()
    from llmray.serve import reward_server as server

    if options.token_file is not None:
        token = server.read_token(options.token_file)
    chosen_port = port if options.port is None else options.port
    return server.serve(arguments, server.Options(options.host or host, chosen_port, token))


def args(words: list[str]) -> int:
    """Print every key, the keys that are named, or the JSON schema."""
    parser = argparse.ArgumentParser(prog="llmray args", description=args.__doc__)
    parser.add_argument("--json-schema", action="store_true", help="a schema for editors")
    parser.add_argument("key", nargs="*", metavar="KEY", help="only these keys")
    options = parser.parse_args(words)
    from llmray.arguments import reference

    print(reference.json_schema() if options.json_schema else reference.describe(options.key))
    return 0


def completion(words: list[str]) -> int:
    """Print a script with which a shell completes commands, keys and choices."""
    from llmray import completion as shells

    if len(words) != 1:
        raise ArgumentsError(
            f"llmray completion takes the name of one shell: {', '.join(shells.SCRIPTS)}. "
            "Try: source <(llmray completion bash)"
        )
    print(shells.script(words[0], {name: command.usage for name, command in COMMANDS.items()}))
    return 0


def version(words: list[str]) -> int:
    """Print the versions that decide what a run does."""
    if words:
        raise ArgumentsError(f"llmray version takes no words, found {words[0]!r}. Leave it out.")
    from llmray import installed

    print(installed.versions())
    return 0


COMMANDS: dict[str, Command] = {
    "train": Command(
        train,
        "train [RUN.yaml] [key=value | --key value ...]",
        "train or evaluate a model as the run file says, with or without Ray",
        RUN_FILE_HELP,
    ),
    "check": Command(
        check,
        "check [RUN.yaml] [key=value | --key value ...] [--explain KEY]",
        "say every problem of a run file at once; loads no model, opens no data",
        RUN_FILE_HELP + CHECK_HELP,
    ),
    "tune": Command(
        tune,
        "tune RUN.yaml [SWEEP.yaml] [key=value | tune.KEY=value ...] [resume=true] [--dry-run]",
        "run trials that differ in the keys of the section tune, and keep the best run file",
        RUN_FILE_HELP + TUNE_HELP,
    ),
    "prepare": Command(
        prepare,
        "prepare RUN.yaml [key=value ...] | --list | --remove KEY ...",
        "build a run's prepared data and say what it holds; list or remove what is kept",
        RUN_FILE_HELP,
    ),
    "chat": Command(
        chat,
        "chat [RUN.yaml] [key=value | --key value ...]",
        "talk in the terminal to a base model or an adapter",
        RUN_FILE_HELP + CHAT_HELP,
    ),
    "export": Command(
        export,
        "export [RUN.yaml] [key=value | --key value ...]",
        "merge adapters into their model and write it as others read it",
        RUN_FILE_HELP + EXPORT_HELP,
    ),
    "plot": Command(
        plot,
        "plot [--key KEY] [--out PICTURE] DIR [DIR ...]",
        "draw a logged key, the loss by default, of several runs in one picture",
        PLOT_HELP,
    ),
    "render": Command(
        render,
        "render [RUN.yaml] [key=value | --key value ...] [--rows N] [--eval] [--ids] [--json]",
        "rows as the model will see them, with what is learned of them; loads no weights",
        RUN_FILE_HELP + RENDER_HELP,
    ),
    "score": Command(
        score,
        "score [RUN.yaml] [key=value | --key value ...] [--input FILE] [--eval]",
        "rewards of a data set, or of lines of JSON, by a reward model",
        RUN_FILE_HELP + SCORE_HELP,
    ),
    "reward-server": Command(
        reward_server,
        "reward-server [RUN.yaml] [key=value ...] [--host H] [--port P] [--token-file F]",
        "answer requests for rewards over HTTP, in LLaMA-Factory's form",
        RUN_FILE_HELP + SERVER_HELP,
    ),
    "args": Command(
        args,
        "args [--json-schema] [KEY ...]",
        "every key with type, default, range and meaning",
    ),
    "completion": Command(
        completion,
        "completion bash|zsh|fish",
        "a script with which a shell completes commands, keys and choices",
        COMPLETION_HELP,
    ),
    "version": Command(version, "version", "the versions that decide what a run does"),
}


def _speak() -> None:
    """Send our log lines to stderr; of several ranks only the first speaks below an error."""
    from llmray.arguments import environment

    level = environment.verbosity(os.environ)
    log.setLevel(level if _rank() == 0 else max(level, logging.ERROR))
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_LineFormatter())
        log.addHandler(handler)
    log.propagate = False


class _LineFormatter(logging.Formatter):
    """The message alone at INFO; above it the level first."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _load(words: list[str]) -> RunArguments:
    from llmray.arguments.loading import load

    if not words:
        raise ArgumentsError(
            "No run file was given. Name a YAML or JSON file, or write the run as key=value words."
        )
    return load(*_file_and_words(words))


def _file_and_words(words: list[str]) -> tuple[str | None, list[str]]:
    """The run file, where the first word is one, and the words that override it."""
    if not words:
        return None, []
    is_override = words[0].startswith("--") or "=" in words[0]
    has_file = not is_override or os.path.isfile(words[0])
    return (words[0], words[1:]) if has_file else (None, words)


def _with_absolute_paths(arguments: RunArguments) -> RunArguments:
    from llmray.arguments import environment, paths

    is_submitted = environment.is_submitted(os.environ)
    base = paths.base_directory(os.environ, is_submitted, Path.cwd())
    return paths.absolute(arguments, base, Path.cwd() if is_submitted else None)


def _before_training(arguments: RunArguments) -> None:
    """Check trackers; in a submitted job, say how to give `ray job stop` the time of a save."""
    from llmray.arguments import environment
    from llmray.train import trackers

    trackers.check(arguments, os.environ)

    if environment.is_submitted(os.environ) and not os.environ.get("RAY_JOB_STOP_WAIT_TIME_S"):
        log.info(
            "`ray job stop` kills this job after 3 s, saved or not; submitted with "
            """--runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}' """
            "it waits for the save"
        )


def _summary(arguments: RunArguments) -> str:
    where = "on Ray" if arguments.ray_enabled else "without Ray"
    facts = {
        "model": arguments.model.model_name_or_path,
        "stage": f"{arguments.finetuning.stage}, {arguments.finetuning.finetuning_type}, {where}",
        "data": ", ".join(arguments.data.dataset),
        "output": arguments.training.output_dir,
    }
    lines = [f"  {name:<7}{value}" for name, value in facts.items() if value]
    return "\n".join(["No problem found.", *lines])


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return argparse.ArgumentParser(
        prog="llmray",
        usage="llmray COMMAND ...",
        description="LLM fine-tuning on Ray clusters from one flat YAML with LLaMA-Factory's keys.",
        epilog="commands:\n" + "\n".join(rows) + "\n\n`llmray COMMAND --help` says more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _unknown_command(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, COMMANDS, n=1)
    if name.endswith((".yaml", ".yml", ".json")):
        return f"{name!r} is no command. To train from that file: llmray train {name}"
    advice = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(COMMANDS)}."
    return f"{name!r} is no command of llmray. {advice}"


def _failed(error: BaseException, text: str, code: int) -> int:
    """Print one message, or the traceback under LLMRAY_DEBUG=1; returns the exit code."""
    from llmray.arguments import environment

    if os.environ.get("LLMRAY_DEBUG", "").strip().lower() in environment.TRUE:
        import traceback

        traceback.print_exception(error)
    if code == 2 and _rank() != 0:
        return code  # every rank reads the same file: rank 0 says it
    prefix = f"rank {_rank()}: " if _rank() else ""
    print(f"{prefix}error: {text}", file=sys.stderr)
    return code


def _rank() -> int:
    """This process's rank where torchrun started it, else 0."""
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    raise SystemExit(main())
