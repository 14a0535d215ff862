"""Who runs where in a run with rewards: a table for people, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

FILE = "placement.json"
HEADS = ("role", "member", "node", "process", "resources")


@dataclass(frozen=True)
class Member:
    """One that takes part in a run.

    Attributes:
        role: what it does.
        name: which of its role: a rank, an actor, a server.
        address: of its node; None where it has none of its own.
        node_id: Ray's name of the node.
        pid: of its process.
        resources: that it holds.
    """

    role: str
    name: str
    address: str | None = None
    node_id: str | None = None
    pid: int | None = None
    resources: Mapping[str, float] | None = None


def lines(members: Sequence[Member]) -> list[str]:
    """The table, one line a member."""
    rows = [HEADS, *(_cells(member) for member in members)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]


def as_json(attempt: int, members: Sequence[Member]) -> str:
    """The same for programs."""
    found = {"attempt": attempt, "members": [asdict(member) for member in members]}
    return json.dumps(found, indent=2) + "\n"


def _cells(member: Member) -> tuple[str, ...]:
    resources = {k: int(v) if v == int(v) else v for k, v in (member.resources or {}).items()}
    return (
        member.role,
        member.name,
        member.address or "with the workers",
        "" if member.pid is None else str(member.pid),
        json.dumps(resources) if resources else "",
    )
