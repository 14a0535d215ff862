"""What two fingerprints of data differ in, in words: of two runs, or of two nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmray.data import identity

# what of a fingerprint follows from the data sets' files
OF_SOURCES = ("sets", "eval_sets")


def differences(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    there: str = "there",
    here: str = "here",
    files: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> list[str]:
    """What of two fingerprints differs, each in a few words: theirs there, ours here.

    Args:
        theirs, ours: the fingerprints.
        there, here: what to call where they come from.
        files: the paths of the files of each set, by the name in `OF_SOURCES`; what differs is
            then said file by file.
    """
    found = []
    for name in sorted({*theirs, *ours}):
        one, other = theirs.get(name), ours.get(name)
        if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
            continue
        paths = files.get(name) if files else None
        named = _files(one or [], other or [], paths, there, here) if paths else []
        found += named or [f"{name} {_short(one)} {there}, {_short(other)} {here}"]
    return found


def _files(
    theirs: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    paths: Sequence[Sequence[str]],
    there: str,
    here: str,
) -> list[str]:
    """The files of sets that differ; none where something else of the sets does too."""
    if len(theirs) != len(ours) or len(ours) != len(paths):
        return []
    said = []
    for one, other, names in zip(theirs, ours, paths, strict=True):
        files, others = one["files"], other["files"]
        if {**one, "files": 0} != {**other, "files": 0}:
            return []
        if len(files) != len(others) or len(others) != len(names):
            where = names[0] if names else "a set"
            said.append(f"the set of {where} has {len(files)} files {there}, {len(others)} {here}")
            continue
        pairs = zip(names, files, others, strict=True)
        said += [f"{name} {there} is not that {here}" for name, a, b in pairs if a != b]
    return said


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:50]}… ({identity.key_of({'': value})[:8]})"
