"""Python code that comes with a model: which of the packages it names must be there.

Such code often names packages that it only uses if they are installed. Transformers asks for all of
them before it runs any; here, as with LLaMA-Factory, a package is missed when the code really needs
it, unless FORCE_CHECK_IMPORTS asks for transformers' own check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from llmray.arguments import environment


@contextmanager
def optional_imports() -> Iterator[None]:
    """Inside, transformers loads a model's code without asking for every package it names."""
    if environment.imports_checked(os.environ):
        yield
        return
    from transformers import dynamic_module_utils as loader

    kept = loader.check_imports
    loader.check_imports = loader.get_relative_imports  # what the check returns when it passes
    try:
        yield
    finally:
        loader.check_imports = kept
