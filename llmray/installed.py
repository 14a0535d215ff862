"""What is installed: the versions that decide what a run does."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from llmray import __version__

PACKAGES = ("torch", "transformers", "peft", "ray", "datasets", "bitsandbytes")


def versions() -> str:
    """Lines with a name and a version each."""
    lines = [f"llmray {__version__}", f"python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)
