"""Named templates beside what their models' own chat templates write; `own_templates` keeps it."""

import json
from typing import Any

import pytest
from own_templates import KEPT, PROBES, named_text

OWN: dict[str, dict[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8"))
ALL = [(name, label) for name, kept in OWN.items() for label in kept["texts"]]


@pytest.mark.parametrize(("name", "label"), ALL)
def test_a_named_template_writes_what_its_models_own_writes(name: str, label: str) -> None:
    kept = OWN[name]
    assert named_text(name, PROBES[label], kept["bos"], kept["eos"]) == kept["texts"][label]


def test_the_families_are_compared_with_and_without_tools() -> None:
    assert {"qwen3", "llama3", "deepseek3", "gemma3", "gpt_oss", "smollm2", "glm4_moe"} <= set(OWN)
    for name in ("qwen3", "glm4_moe"):
        assert set(OWN[name]["texts"]) == set(PROBES)
    for name, kept in OWN.items():
        assert {"turns", "system", "prompt", "thoughts"} <= set(kept["texts"]), name
