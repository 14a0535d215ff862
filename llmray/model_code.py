"""Python code that comes with a model: which of the packages it names must be there.

Such code often names packages that it only uses if they are installed. Transformers asks for all of
them before it runs any; here, as with LLaMA-Factory, a package is missed when the code really needs
it, unless FORCE_CHECK_IMPORTS asks for transformers' own check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from llmray.arguments import environment

_is_optional = ContextVar("_is_optional", default=False)


@contextmanager
def optional_imports() -> Iterator[None]:
    """Inside, transformers loads a model's code without asking for every package it names.

    Threads may be inside at the same time.
    """
    if environment.imports_checked(os.environ):
        yield
        return
    _make_checks_optional()
    token = _is_optional.set(True)
    try:
        yield
    finally:
        _is_optional.reset(token)


@cache
def _make_checks_optional() -> None:
    """Let transformers' check pass inside of `optional_imports`, in whichever thread that is."""
    from transformers import dynamic_module_utils as loader

    check = loader.check_imports

    def checked(filename: str | os.PathLike[str]) -> list[str]:
        # what the check returns when it passes
        return loader.get_relative_imports(filename) if _is_optional.get() else check(filename)

    loader.check_imports = checked
