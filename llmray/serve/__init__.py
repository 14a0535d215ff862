"""What people and programs talk to: the terminal chat, the reward server."""

from __future__ import annotations

from importlib.util import find_spec

from llmray.errors import ArgumentsError


def require_packages() -> None:
    """Fail where the packages of the reward server are missing.

    Raises:
        ArgumentsError: names them and the extra that has them.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ArgumentsError(
            f"the reward server needs {' and '.join(missing)}, not installed here. Install them: "
            "pip install 'llmray[serve]'."
        )
