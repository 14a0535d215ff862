"""The reward models that runs load beside their workers, and which runs can share one.

Runs whose keys make the same of a reward model ask one set of actors. What only the asking side
reads, such as weights, timeouts and what becomes of a missing score, may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmray.arguments import names
from llmray.arguments.problems import given
from llmray.arguments.rlhf import kind_of, names_of

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments
    from llmray.arguments.space import Space

# what a reward model is, what it reads of an answer, and how its actors score
MAKES = (
    "reward_model_type",
    "model_name_or_path",
    "model_revision",
    "template",
    "default_system",
    "use_fast_tokenizer",
    "add_tokens",
    "add_special_tokens",
    "new_special_tokens_config",
    "split_special_tokens",
    "trust_remote_code",
    "allow_pickled_weights",
    "infer_dtype",
    "use_cpu",
    "reward_batching",
    "reward_batch_tokens",
)
OF_A_MODEL = ("reward_model_adapters", "reward_model_quantization_bit")
OF_AN_ADAPTER = ("quantization_bit",)  # its base is loaded as the policy's
OF_LOW_BITS = ("quantization_method", "quantization_type", "double_quantization")
# how many actors there are, and where
HOLDS = (
    "reward_num_actors",
    "reward_resources_per_actor",
    "reward_placement_strategy",
    "reward_label_selector",
)
DECIDE = ("reward_model", *MAKES, *OF_A_MODEL, *OF_AN_ADAPTER, *OF_LOW_BITS, *HOLDS)


@dataclass(frozen=True)
class RewardSet:
    """A reward model that runs ask, and its actors.

    Attributes:
        name: as it is in reward_model.
        run: one of those that ask it.
        short: its name in metrics of that run.
        key: equal for runs that can share it.
        apart: what tells it from another one of the same name, for messages; empty where there is
            none.
    """

    name: str
    run: RunArguments = field(repr=False)
    short: str
    key: str
    apart: str = ""


def of_run(run: RunArguments) -> list[RewardSet]:
    """The reward models of a run, in the order in which it names them; none but in stage ppo."""
    if run.finetuning.stage != "ppo":
        return []
    asked = run.rlhf.reward_models
    return [
        RewardSet(name, run, short, json.dumps(_decided(name, run), sort_keys=True))
        for name, short in zip(asked, names_of(asked), strict=True)
        if kind_of(name) == "model"
    ]


def of_runs(runs: Iterable[RunArguments]) -> list[RewardSet]:
    """The reward models of some runs, each once."""
    found: dict[str, RewardSet] = {}
    for run in runs:
        for one in of_run(run):
            found.setdefault(one.key, one)
    return _told_apart(list(found.values()))


def differing(sets: Sequence[RewardSet]) -> tuple[str, ...]:
    """The keys for which a reward model of one name is there more than once."""
    found: dict[str, None] = {}
    for one in sets:
        same = [json.loads(other.key) for other in sets if other.name == one.name]
        found |= dict.fromkeys(_differ(same))
    return tuple(found)


def may_ask(run: RunArguments, space: Space) -> bool:
    """Whether a run or one of its trials asks a reward model."""
    named = [run.rlhf.reward_model]
    named += [v for d in space.dimensions if d.key == "reward_model" for v in d.distribution.values]
    named += [variant.get("reward_model") for variant in space.variants]
    words = (word.strip() for text in named if text for word in str(text).split(","))
    return run.finetuning.stage == "ppo" and any(kind_of(word) == "model" for word in words if word)


def space_of(space: Space) -> Space:
    """What of a search space decides reward models, with the keys on which such a key depends."""
    known = {key for key in space.keys if names.ALIASES.get(key, key) in DECIDE}
    while more := {n for d in space.dimensions if d.key in known for n in d.when} - known:
        known |= more
    return space.restricted(known)


def _decided(name: str, run: RunArguments) -> dict[str, Any]:
    """What decides a reward model, by key."""
    flat = run.flat()
    own: tuple[str, ...]
    if run.rlhf.reward_model_type == "lora":
        own, bits = OF_AN_ADAPTER, flat["quantization_bit"]
    else:
        own, bits = OF_A_MODEL, flat["reward_model_quantization_bit"]
    keys = (*MAKES, *own, *(OF_LOW_BITS if bits is not None else ()), *HOLDS)
    return {"reward_model": name, **{key: flat[key] for key in keys}}


def _told_apart(sets: Sequence[RewardSet]) -> list[RewardSet]:
    """The same, of which those with one name say in which keys they differ."""
    found = []
    for one in sets:
        same = [json.loads(other.key) for other in sets if other.short == one.short]
        own = json.loads(one.key)
        said = ", ".join(given(key, own.get(key)) for key in _differ(same))
        found.append(replace(one, apart=f" ({said})" if said else ""))
    return found


def _differ(decided: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in DECIDE if any(one.get(key) != decided[0].get(key) for one in decided)]
