"""Arguments of sweeps."""

from __future__ import annotations

from llmray.arguments.group import Field, Group, Object


class TuneArguments(Group):
    """What `llmray tune` varies."""

    tune: Object | None = Field(
        None, description="Search space over keys, metric, mode and scheduler of a sweep."
    )
