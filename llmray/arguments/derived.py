"""What follows from other keys: keys that may be written, and must then say what follows.

LLaMA-Factory derives `compute_dtype`, `device_map`, `model_max_length` and `block_diag_attn` by
itself. Here a run file may state them; what contradicts the keys that they follow from is a
problem, so that none of them is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmray.arguments.problems import Problem, given
from llmray.errors import ArgumentsError

if TYPE_CHECKING:
    from llmray.arguments.method_rules import Rule
    from llmray.arguments.run import RunArguments


def asked_dtype(arguments: RunArguments) -> str | None:
    """The dtype that bf16, fp16, fp32 and pure_bf16 ask for; None where none of them is given."""
    training = arguments.training
    if arguments.finetuning.pure_bf16 or training.bf16:
        return "bfloat16"
    if training.fp16:
        return "float16"
    said = training.fp32 or training.bf16 is not None or training.fp16 is not None
    return "float32" if said else None


def compute_dtype(arguments: RunArguments) -> str | None:
    """The dtype of the run's arithmetic; None leaves it to the hardware."""
    return asked_dtype(arguments) or arguments.model.compute_dtype


def check_device(device_map: str | dict[str, Any] | None, device: str) -> None:
    """Compare the device that device_map names with the one that this process has.

    Args:
        device_map: as the run file has it.
        device: such as `cpu` or `cuda:0`.

    Raises:
        ArgumentsError: they differ.
    """
    named = _one_device(device_map)
    if named is not None and named not in (device, device.partition(":")[0]):
        raise ArgumentsError(
            f"{given('device_map', device_map)}, but this process computes on {device}. Each "
            "process has one device: write resources_per_worker or CUDA_VISIBLE_DEVICES, and "
            "remove device_map."
        )


def dtype_follows_precision(arguments: RunArguments) -> Iterator[Problem]:
    """compute_dtype is what bf16, fp16, fp32 or pure_bf16 ask for."""
    stated, asked = arguments.model.compute_dtype, asked_dtype(arguments)
    if stated is not None and asked is not None and stated != asked:
        values = {
            "bf16": arguments.training.bf16,
            "fp16": arguments.training.fp16,
            "fp32": arguments.training.fp32 or None,
            "pure_bf16": arguments.finetuning.pure_bf16 or None,
        }
        said = {key: value for key, value in values.items() if value is not None}
        yield Problem(
            ("compute_dtype", *said),
            f"compute_dtype={stated} with {' with '.join(given(k, v) for k, v in said.items())}: "
            f"that is {asked}. Remove compute_dtype.",
        )


def length_follows_cutoff(arguments: RunArguments) -> Iterator[Problem]:
    """model_max_length is cutoff_len."""
    stated, cutoff = arguments.model.model_max_length, arguments.data.cutoff_len
    if stated is not None and stated != cutoff:
        yield Problem(
            ("model_max_length", "cutoff_len"),
            f"model_max_length={stated} with cutoff_len={cutoff}: rows are cut at cutoff_len. "
            f"Write cutoff_len: {stated}, and remove model_max_length.",
        )


def texts_are_apart(arguments: RunArguments) -> Iterator[Problem]:
    """block_diag_attn holds wherever a row has one text; packed texts of stage pt share a block."""
    packs = arguments.finetuning.stage == "pt" and arguments.data.packing is not False
    if arguments.model.block_diag_attn and packs:
        yield Problem(
            ("block_diag_attn", "packing", "stage"),
            "block_diag_attn=true with stage=pt: texts that are packed into one block see each "
            "other there. Write packing: false, or remove block_diag_attn.",
        )


def model_is_on_one_device(arguments: RunArguments) -> Iterator[Problem]:
    """device_map puts the whole model on the device of its process."""
    stated = arguments.model.device_map
    if stated is not None and _one_device(stated) is None:
        yield Problem(
            ("device_map",),
            f"{given('device_map', stated)}: each process holds the whole model on its own "
            "device. Write resources_per_worker or CUDA_VISIBLE_DEVICES, and remove device_map.",
        )


def _one_device(device_map: str | dict[str, Any] | None) -> str | None:
    """The device on which a device_map puts the whole model, None where there is none such."""
    place: Any = device_map
    if isinstance(device_map, dict):
        place = device_map[""] if set(device_map) == {""} else None
    if isinstance(place, int) and not isinstance(place, bool):
        return f"cuda:{place}"
    is_device = isinstance(place, str) and place.partition(":")[0] in ("cpu", "cuda")
    return place if is_device else None


DERIVED_RULES: tuple[Rule, ...] = (
    dtype_follows_precision,
    length_follows_cutoff,
    texts_are_apart,
    model_is_on_one_device,
)
