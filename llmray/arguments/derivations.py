"""What follows from other keys where a key is not given: one table, for `check --explain`.

The code that uses a key draws the same conclusion; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from llmray.arguments import derived
from llmray.arguments.cluster import RAY_KEYS

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments


@dataclass(frozen=True)
class Derivation:
    """How the value of a key that is not given follows.

    `rule` is said after the value; `value` computes it from the file alone, None where only the
    run itself can know it (hardware, memory, the number of rows).
    """

    key: str
    sources: tuple[str, ...]
    rule: str
    value: Callable[[RunArguments], Any] | None = None


def _run_name(arguments: RunArguments) -> str | None:
    output_dir = arguments.training.output_dir
    return PurePath(output_dir).name if output_dir else None


def _beams(arguments: RunArguments) -> int:
    return arguments.training.generation_num_beams or arguments.generating.num_beams


_BY_HARDWARE = "chosen where the run starts, by what the device computes fast"

DERIVATIONS: tuple[Derivation, ...] = (
    Derivation(
        "lora_alpha",
        ("lora_rank",),
        "twice lora_rank",
        lambda arguments: 2 * arguments.finetuning.lora_rank,
    ),
    Derivation("data_seed", ("seed",), "seed", lambda arguments: arguments.training.seed),
    Derivation(
        "eval_steps",
        ("logging_steps",),
        "logging_steps",
        lambda arguments: arguments.training.logging_steps,
    ),
    Derivation(
        "packing",
        ("stage",),
        "true for stage pt",
        lambda arguments: arguments.finetuning.stage == "pt",
    ),
    Derivation(
        "eval_num_beams",
        ("generation_num_beams", "num_beams"),
        "generation_num_beams, else num_beams",
        _beams,
    ),
    Derivation(
        "generation_num_beams",
        ("num_beams",),
        "num_beams",
        lambda arguments: arguments.generating.num_beams,
    ),
    Derivation(
        "use_ray",
        RAY_KEYS,
        "whether USE_RAY or one of Ray's keys is set",
        lambda arguments: arguments.ray_enabled,
    ),
    Derivation("ray_run_name", ("output_dir",), "the last part of output_dir", _run_name),
    Derivation("ray_storage_path", (), "where none is named", lambda a: a.cluster.storage_path),
    Derivation("ray_num_workers", (), "where none is named", lambda a: a.cluster.num_workers),
    Derivation("resources_per_worker", (), "where none are named", lambda a: a.cluster.resources),
    Derivation("placement_strategy", (), "where none is named", lambda a: a.cluster.strategy),
    Derivation("bf16", ("fp16", "fp32", "pure_bf16", "compute_dtype"), _BY_HARDWARE),
    Derivation("fp16", ("bf16", "fp32", "pure_bf16", "compute_dtype"), _BY_HARDWARE),
    Derivation("fp32", ("bf16", "fp16", "pure_bf16", "compute_dtype"), _BY_HARDWARE),
    Derivation(
        "compute_dtype",
        ("bf16", "fp16", "fp32", "pure_bf16"),
        "from the keys of the number format, else " + _BY_HARDWARE,
        derived.asked_dtype,
    ),
    Derivation("model_max_length", ("cutoff_len",), "cutoff_len", lambda a: a.data.cutoff_len),
    Derivation(
        "disable_gradient_checkpointing",
        ("per_device_train_batch_size", "cutoff_len", "use_unsloth_gc"),
        "false where the run would not fit into memory otherwise, by estimate",
    ),
)

DERIVED: dict[str, Derivation] = {row.key: row for row in DERIVATIONS}
