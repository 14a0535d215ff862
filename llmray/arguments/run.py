"""The arguments of a run: all groups together, as values and as a run file.

How they are read and checked stands in `loading`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr
from pydantic.fields import FieldInfo

from llmray.arguments.cluster import ClusterArguments
from llmray.arguments.data import DataArguments
from llmray.arguments.evaluation import EvaluationArguments
from llmray.arguments.export import ExportArguments
from llmray.arguments.finetuning import FinetuningArguments
from llmray.arguments.generating import GeneratingArguments
from llmray.arguments.group import Group
from llmray.arguments.model import ModelArguments
from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.problems import as_plain, plain_types
from llmray.arguments.rlhf import RlhfArguments
from llmray.arguments.tracking import TrackingArguments
from llmray.arguments.training import TrainingArguments
from llmray.arguments.tune import TuneArguments

GROUPS: dict[str, type[Group]] = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "rlhf": RlhfArguments,
    "optimizer": OptimizerArguments,
    "training": TrainingArguments,
    "cluster": ClusterArguments,
    "generating": GeneratingArguments,
    "tracking": TrackingArguments,
    "export": ExportArguments,
    "evaluation": EvaluationArguments,
    "tune": TuneArguments,
}
FIELDS: dict[str, FieldInfo] = {
    key: field for group in GROUPS.values() for key, field in group.model_fields.items()
}
GROUP_OF: dict[str, str] = {
    key: name for name, group in GROUPS.items() for key in group.model_fields
}
UNICODE_LINE_ENDS = frozenset("\x85\u2028\u2029")
DEFAULTS: dict[str, Any] = {key: field.get_default() for key, field in FIELDS.items()}


class _Dumper(yaml.SafeDumper):
    """YAML in which no text loses the line ends of Unicode: PyYAML writes them bare, as folds."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if UNICODE_LINE_ENDS.intersection(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


class RunArguments(BaseModel):
    """Everything that a run file says, by group. Frozen; `loading.replace` gives a changed copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelArguments = ModelArguments()
    data: DataArguments = DataArguments()
    finetuning: FinetuningArguments = FinetuningArguments()
    rlhf: RlhfArguments = RlhfArguments()
    optimizer: OptimizerArguments = OptimizerArguments()
    training: TrainingArguments = TrainingArguments()
    cluster: ClusterArguments = ClusterArguments()
    generating: GeneratingArguments = GeneratingArguments()
    tracking: TrackingArguments = TrackingArguments()
    export: ExportArguments = ExportArguments()
    evaluation: EvaluationArguments = EvaluationArguments()
    tune: TuneArguments = TuneArguments()

    @property
    def ray_enabled(self) -> bool:
        """Whether Ray starts the workers: `use_ray` where given, else whether a Ray key is."""
        return self.cluster.ray_enabled

    def flat(self) -> dict[str, Any]:
        """Every key and its value, in types that JSON has; secrets are left out."""
        return {
            key: as_plain(value)
            for key, value in self.values().items()
            if SecretStr not in plain_types(FIELDS[key])
        }

    def values(self) -> dict[str, Any]:
        """Every key and its value, as it is."""
        return {key: self.value(key) for key in GROUP_OF}

    def value(self, key: str) -> Any:
        """The value of one key."""
        return getattr(getattr(self, GROUP_OF[key]), key)

    def yaml(self, *, leave_out_defaults: bool = False) -> str:
        """A run file that loads to an equal object; keys that are not given are left out.

        Args:
            leave_out_defaults: leave out what is as it would be without being written, too.
        """
        flat = self.flat()
        parts = []
        for name, group in GROUPS.items():
            lines = {key: flat[key] for key in group.model_fields if flat.get(key) is not None}
            if leave_out_defaults:
                lines = {k: value for k, value in lines.items() if value != as_plain(DEFAULTS[k])}
            if lines:
                text = yaml.dump(
                    lines, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
                )
                parts.append(f"# {name}\n{text}")
        return "\n".join(parts)

    def save(self, path: str | Path) -> None:
        """Write `yaml()` to a file."""
        Path(path).write_text(self.yaml(), encoding="utf-8")
