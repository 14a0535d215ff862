"""Environment variables are read in one place and in their form."""

import logging
import re
from pathlib import Path

import pytest

import llmray
from llmray.arguments import environment
from llmray.errors import ArgumentsError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("Y", True), ("0", False), ("no", False), ("", None)],
)
def test_flags(text, value):
    assert environment.use_ray({"USE_RAY": text}) is value


def test_what_is_not_set():
    assert environment.use_ray({}) is None
    assert environment.allow_extra_args({}) is False
    assert environment.version_check_disabled({}) is False
    assert environment.debug({}) is False
    assert environment.home({}) is None
    assert environment.cache_directory({}) == Path.home() / ".cache" / "llmray"
    assert environment.passed_on({}) == ()
    assert environment.secrets({}) == {}
    assert environment.verbosity({}) == logging.INFO
    assert environment.count({}, "NNODES", 1) == 1


def test_what_is_set():
    environ = {
        "LLMRAY_HOME": "/h",
        "LLMRAY_CACHE": "~/c",
        "LLMRAY_PASS_ENV": "A, B,",
        "HF_TOKEN": "hush",
        "LLAMAFACTORY_VERBOSITY": "warn",
        "NNODES": "2",
        "DISABLE_VERSION_CHECK": "1",
        "LLMRAY_DEBUG": "1",
    }
    assert environment.home(environ) == Path("/h")
    assert environment.cache_directory(environ) == Path.home() / "c"
    assert environment.passed_on(environ) == ("A", "B")
    assert environment.secrets(environ) == {"HF_TOKEN": "hush"}
    assert environment.verbosity(environ) == logging.WARNING
    assert environment.count(environ, "NNODES", 1) == 2
    assert environment.version_check_disabled(environ)
    assert environment.debug(environ)


@pytest.mark.parametrize(
    ("read", "environ"),
    [
        (environment.use_ray, {"USE_RAY": "perhaps"}),
        (environment.verbosity, {"LLAMAFACTORY_VERBOSITY": "LOUD"}),
        (lambda environ: environment.count(environ, "NNODES", 1), {"NNODES": "many"}),
        (lambda environ: environment.count(environ, "NNODES", 1), {"NNODES": "0"}),
    ],
)
def test_what_is_wrong_is_said_with_its_value(read, environ):
    name, value = next(iter(environ.items()))
    with pytest.raises(ArgumentsError, match=f"{name}={value}"):
        read(environ)


def test_our_variables_are_declared_where_they_are_read():
    """A name of ours in the package is a declared one, so that the reference names all of them."""
    sources = Path(llmray.__file__).parent.rglob("*.py")
    named = {
        name for path in sources for name in re.findall(r"\bLLMRAY_[A-Z_]+\b", path.read_text())
    }
    assert named <= set(environment.VARIABLES)
