"""Rules between keys of preference learning: which stage and which loss reads what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmray.arguments.problems import Problem, given

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

Rule = Callable[["RunArguments"], Iterator[Problem]]

REFERENCE_FREE = ("orpo", "simpo")

# the stages that read a key; elsewhere it would be accepted and ignored
STAGES_OF = {
    "pref_beta": ("dpo", "kto"),
    "pref_ftx": ("dpo", "kto"),
    "pref_bco_weight": ("dpo",),
    "pref_loss": ("dpo",),
    "dpo_label_smoothing": ("dpo",),
    "ld_alpha": ("dpo",),
    "simpo_gamma": ("dpo",),
    "kto_chosen_weight": ("kto",),
    "kto_rejected_weight": ("kto",),
    "ref_model": ("dpo", "kto", "ppo"),
    "ref_model_adapters": ("dpo", "kto", "ppo"),
    "ref_model_quantization_bit": ("dpo", "kto", "ppo"),
    "precompute_ref_logps": ("dpo", "kto"),
}
REFERENCE_KEYS = (
    *("ref_model", "ref_model_adapters", "ref_model_quantization_bit", "precompute_ref_logps"),
)


def _asked(arguments: RunArguments) -> dict[str, object]:
    """The keys of this module that are away from their defaults, with their values."""
    fields = type(arguments.rlhf).model_fields
    values = {key: getattr(arguments.rlhf, key) for key in STAGES_OF}
    return {key: value for key, value in values.items() if value != fields[key].default}


def preference_keys_have_their_stage(arguments: RunArguments) -> Iterator[Problem]:
    """A key of preference learning is for the stages that read it."""
    stage = arguments.finetuning.stage
    for key, value in _asked(arguments).items():
        if stage not in STAGES_OF[key]:
            stages = " or ".join(STAGES_OF[key])
            yield Problem(
                (key, "stage"),
                f"{given(key, value)} with stage={stage}: it is for stage {stages}. Remove {key}, "
                f"or write stage: {STAGES_OF[key][0]}.",
            )


def losses_read_their_keys(arguments: RunArguments) -> Iterator[Problem]:
    """Some losses compare with no reference, and one has a margin."""
    loss, asked = arguments.rlhf.pref_loss, _asked(arguments)
    if arguments.finetuning.stage != "dpo":
        return
    if loss in REFERENCE_FREE:
        for key in (*REFERENCE_KEYS, "pref_bco_weight"):
            if asked.get(key):
                yield Problem(
                    (key, "pref_loss"),
                    f"{given(key, asked[key])} with pref_loss={loss}: this loss compares with no "
                    f"reference. Remove {key}, or take another pref_loss.",
                )
    if "simpo_gamma" in asked and loss != "simpo":
        yield Problem(
            ("simpo_gamma", "pref_loss"),
            f"{given('simpo_gamma', asked['simpo_gamma'])} with pref_loss={loss}: it is a margin "
            "of the simpo loss. Remove it, or write pref_loss: simpo.",
        )


def bits_of_a_reference_of_its_own(arguments: RunArguments) -> Iterator[Problem]:
    """A reference that is the policy at its start has the policy's weights."""
    rlhf = arguments.rlhf
    bits = rlhf.ref_model_quantization_bit
    if bits is not None and not (rlhf.ref_model or rlhf.ref_model_adapters):
        yield Problem(
            ("ref_model_quantization_bit", "ref_model"),
            f"ref_model_quantization_bit={bits} without ref_model: the reference is the policy as "
            "it was, with its weights. Write ref_model, or remove ref_model_quantization_bit.",
        )


def streams_know_no_rows(arguments: RunArguments) -> Iterator[Problem]:
    """What is kept by row needs rows that are known."""
    if arguments.data.streaming and arguments.rlhf.precompute_ref_logps is True:
        yield Problem(
            ("precompute_ref_logps", "streaming"),
            "precompute_ref_logps=true with streaming=true: it is kept by row, and the rows of a "
            "stream are not known. Remove one of them.",
        )


PREFERENCE_RULES: tuple[Rule, ...] = (
    preference_keys_have_their_stage,
    losses_read_their_keys,
    bits_of_a_reference_of_its_own,
    streams_know_no_rows,
)
