"""Bytes that a worker needs, from arguments, a configuration and headers alone; no torch.

    estimate(arguments, decoder(read_config(folder)), shapes(folder), Situation(...))

What autograd keeps of a layer is counted term by term, as transformers' decoders compute it and as
`attention`, `head` and peft add to it. `docs/memory.md` has the measured table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from llmray.arguments.finetuning import FinetuningArguments
from llmray.arguments.model import ModelArguments
from llmray.arguments.run import RunArguments
from llmray.model.architecture import (
    Decoder,
    Shapes,
    count,
    decoder,
    formats,
    is_expert,
    is_linear,
    is_lone_expert,
    layer_of,
    read_config,
    shapes,
    shapes_of,
    stored_bytes,
)
from llmray.model.trained import Trained, what_trains

CHUNK = {"cpu": 96 << 20, "cuda": 512 << 20}  # logits that the loss holds at once, in bytes
ERROR = 0.15  # of the peak, by which an estimate may be wrong
AT_FIRST, OF_ADAPTERS = 24 << 20, 24 << 20  # what libraries take at first use, and their modules

# optimizer -> bytes of its state and bytes beside it while it updates, per value that trains; None:
# as many as the value has. What is not here keeps two moments.
STATES: dict[str, tuple[float | None, float | None]] = {
    "adamw_torch": (None, None),
    "adamw_torch_fused": (None, 0),
    "adamw_bnb_8bit": (2.1, 0),
    "adamw_8bit": (2.1, 0),
    "paged_adamw_8bit": (2.1, 0),
    "lion_8bit": (1.05, 0),
    "adafactor": (0, 0),
    "sgd": (0, 0),
    "adagrad": (4, 0),
    "rmsprop": (4, 0),
}

OUTWARD = {"o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "w2", "dense_4h_to_h"}


@dataclass(frozen=True)
class Situation:
    """What an estimate depends on beside the run's arguments.

    `num_tokens` and `longest` are those of the largest micro-batch and of its longest row;
    `shards` names what is spread over the workers: optimizer, gradients, weights (ZeRO 1 to 3).
    """

    num_tokens: int
    longest: int
    precision: str  # a name of precision.PRECISIONS
    recomputes: bool
    device: str = "cpu"  # or cuda
    num_workers: int = 1
    shards: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset()  # of the weights in the files, by safetensors' names
    stored: int | None = None  # bytes of weights that are quantised in their files


@dataclass(frozen=True)
class Estimate:
    """The parts of a worker's memory in bytes, and the moments at which it needs the most.

    Attributes:
        weights: of the model and its adapters, quantised or not, in the format they are held in.
        gradients: of all that trains.
        optimizer: its state.
        activations: what backward needs of the largest micro-batch.
        backward: gradients inside one layer, and what it recomputes.
        loss: the head's chunk of logits and its gradients.
        casts: copies of weights in the format of the arithmetic.
        update: what the optimizer holds while it updates.
        start: what PiSSA needs to take its part of the largest matrix.
        reread: ordinary weights that are read for it beside low-bit ones, mapped from their files.
        loading: what loading needs beside the weights.
        mapped: weights that stay mapped from their files, which the system can drop.
        first_use: what a process holds beside tensors.
        keeps_gradients: whether gradients are there during the forward pass too.
        rewards: reward models in the same process, which are loaded last.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    backward: int
    loss: int
    casts: int
    update: int
    start: int
    reread: int
    loading: int
    mapped: int
    first_use: int
    keeps_gradients: bool
    rewards: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at each moment that may need the most."""
        held = self.weights + self.optimizer + self.rewards
        kept = self.gradients if self.keeps_gradients else 0
        return {
            "loading": self.weights + self.loading,
            "start": self.weights + self.start + self.reread + self.rewards,
            "loss": held + kept + self.activations + self.casts + self.loss,
            "backward": held + kept + self.activations + self.casts + self.backward,
            "end of backward": held + self.gradients + self.casts + self.backward,
            "update": held + self.gradients + self.update,
        }

    @property
    def peak(self) -> int:
        """The most that is needed at once."""
        return max(self.phases.values())

    @property
    def resident(self) -> int:
        """The growth of a process's anonymous memory on a CPU, where freed blocks go back."""
        anonymous = {**self.phases, "start": self.weights + self.start + self.rewards}
        return max(anonymous.values()) + self.first_use - self.mapped

    def lines(self) -> list[str]:
        """The parts for a reader, largest first, then the peak and when it is."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in BESIDE}
        ordered = sorted(parts.items(), key=lambda item: -item[1])
        when = max(self.phases, key=lambda name: self.phases[name])
        return [
            *(f"{name:<12} {gigabytes(value)}" for name, value in ordered if value),
            f"{'peak':<12} {gigabytes(self.peak)} ({when})",
        ]


BESIDE = ("mapped", "first_use", "keeps_gradients")  # fields that are no part of the sum


def gigabytes(size: float) -> str:
    """A size for a reader, in units of 10 ** 9 bytes."""
    return f"{size / 1e9:.2f} GB"


def estimate_for(
    arguments: RunArguments,
    directory: Path,
    lengths: Sequence[int],
    precision: str,
    *,
    recomputes: bool,
    device: str = "cpu",
    num_workers: int = 1,
) -> Estimate:
    """The memory of one worker that trains the model of a folder.

    Args:
        arguments: of the run.
        directory: with config.json, and weights or none.
        lengths: of the rows, in tokens; a micro-batch may hold the longest of them.
        precision: a name of precision.PRECISIONS.
        recomputes: whether activations are recomputed.
        device: cpu or cuda.
        num_workers: that train together.

    Raises:
        ModelError: if the configuration or a header cannot be read.
    """
    config = read_config(directory)
    model = decoder(config)
    rows = sorted(lengths, reverse=True)[: arguments.training.per_device_train_batch_size]
    longest = max(rows, default=0)
    situation = Situation(
        num_tokens=longest * len(rows) if _is_padded(arguments) else sum(rows),
        longest=longest,
        precision=precision,
        recomputes=recomputes,
        device=device,
        num_workers=num_workers,
        formats=formats(directory),
        stored=stored_bytes(directory) if "quantization_config" in config else None,
    )
    return estimate(arguments, model, shapes(directory) or shapes_of(model), situation)


def estimate(
    arguments: RunArguments, model: Decoder, table: Shapes, situation: Situation
) -> Estimate:
    """The memory of one worker that trains.

    Args:
        arguments: of the run.
        model: the sizes of the decoder.
        table: shapes of its parameters, from headers or from `architecture.shapes_of`.
        situation: the largest micro-batch and where it is computed.
    """
    if model.is_tied:
        table = {n: s for n, s in table.items() if not n.startswith("lm_head.")}
    trained = what_trains(arguments.finetuning, model, table)
    form = _Format.of(situation, trains_own=bool(trained.own), finetuning=arguments.finetuning)
    values = trained.num_adapter + count(trained.own)
    kept_as_is = _frozen(arguments, table, trained)
    frozen = situation.stored or frozen_bytes(arguments.model, kept_as_is, form.frozen)
    weights = frozen + values * form.trained
    weights += _reference_bytes(arguments, table, form)
    kept, beside = _states(arguments, values, form)
    split = situation.num_workers
    largest = max((math.prod(s) for s in table.values()), default=0) * form.compute
    sharded = "weights" in situation.shards
    return Estimate(
        weights=weights // split + 2 * largest if sharded else weights,
        gradients=values * form.trained // (split if "gradients" in situation.shards else 1),
        optimizer=kept // (split if "optimizer" in situation.shards else 1),
        activations=_activations(model, trained, form, situation, arguments),
        backward=_backward(model, trained, form, situation, arguments),
        loss=_loss(model, trained, form, situation),
        casts=_casts(trained, form),
        update=beside // (split if "optimizer" in situation.shards else 1),
        start=_start(arguments, trained),
        reread=_reread(arguments, table, situation),
        loading=_loading(arguments, table, form, frozen),
        mapped=_mapped(arguments, situation, form, kept_as_is),
        first_use=AT_FIRST + (OF_ADAPTERS if trained.adapted else 0),
        keeps_gradients=situation.num_workers > 1
        or arguments.training.gradient_accumulation_steps > 1,
    )


# ---- weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """Bytes of one value."""

    compute: int  # in products
    trained: int
    frozen: int
    stream: int  # between layers
    casts: bool  # whether products cast their operands
    mask: int  # of dropout

    @classmethod
    def of(
        cls, situation: Situation, *, trains_own: bool, finetuning: FinetuningArguments
    ) -> _Format:
        mask = 4 if situation.device == "cpu" else 1
        if situation.precision == "fp32":
            return cls(4, 4, 4, 4, False, mask)
        if situation.precision == "pure_bf16":
            return cls(2, 2, 2, 2, False, mask)
        is_full = trains_own and finetuning.finetuning_type == "full"
        return cls(2, 4, 2, 4 if is_full else 2, True, mask)


def _frozen(arguments: RunArguments, table: Shapes, trained: Trained) -> Shapes:
    """What does not train; modules that train whole beside an adapter are there twice."""
    is_lora = arguments.finetuning.finetuning_type not in ("full", "freeze")
    return {n: s for n, s in table.items() if is_lora or n not in trained.own}


def frozen_bytes(model: ModelArguments, frozen: Shapes, size: int) -> int:
    """Bytes of parameters that do not train.

    Args:
        model: says of how many bits they are.
        frozen: the parameters.
        size: bytes of a value that is not quantised.
    """
    bits, total = model.quantization_bit, 0.0
    for name, shape in frozen.items():
        values = math.prod(shape)
        if bits is not None and is_linear(name, shape):
            total += values * quantized_bytes(bits, doubly=model.double_quantization)
            total += 4 * shape[0] if bits == 8 else 0
        else:
            total += values * size
    return int(total)


def _reference_bytes(arguments: RunArguments, table: Shapes, form: _Format) -> int:
    """A second model that the policy is compared with; an adapter is switched off instead."""
    tuning, rlhf = arguments.finetuning, arguments.rlhf
    compares = tuning.stage in ("kto", "ppo") or (
        tuning.stage == "dpo" and rlhf.pref_loss not in ("orpo", "simpo")
    )
    is_adapter = tuning.finetuning_type not in ("full", "freeze")
    if not compares or (is_adapter and rlhf.ref_model is None):
        return 0
    return count(table) * form.frozen


def quantized_bytes(bits: int, *, doubly: bool) -> float:
    """Bytes of one value with its share of the constants.

    4 bits: a scale of float32 for 64 values, or with double quantisation one of 8 bits for 64 and
    of float32 for 64 * 256.
    """
    if bits == 8:
        return 1.0
    constants = 1 / 64 + 4 / (64 * 256) if doubly else 4 / 64
    return bits / 8 + constants


def _states(arguments: RunArguments, values: int, form: _Format) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what it holds while it updates."""
    name = arguments.optimizer.optim
    state, beside = STATES.get(name, (None, None))
    per_value = 2 * form.trained if state is None else state
    at_once = form.trained if beside is None else beside
    if name == "sgd" and "momentum" in (arguments.optimizer.optim_args or ""):
        per_value = form.trained
    return int(values * per_value), int(values * at_once)


def _casts(trained: Trained, form: _Format) -> int:
    """Autocast keeps a copy of each weight that trains and takes part in a product."""
    if not form.casts:
        return 0
    own = sum(math.prod(s) for n, s in trained.own.items() if len(s) > 1 and "embed" not in n)
    return (own + trained.num_adapter) * form.compute


def _loading(arguments: RunArguments, table: Shapes, form: _Format, frozen: int) -> int:
    """Weights that train are read in float32, and the rest cast one by one afterwards."""
    tuning = arguments.finetuning
    if form.casts and tuning.finetuning_type == "freeze":
        return count(table) * 4 - frozen
    largest = max((math.prod(s) for s in table.values()), default=0)
    return largest * form.compute if arguments.model.is_quantized else 0


def _start(arguments: RunArguments, trained: Trained) -> int:
    """A matrix, its principal part and what is left, in double precision."""
    if not arguments.finetuning.pissa_init:
        return 0
    return 3 * 8 * max(map(math.prod, trained.adapted.values()), default=0)


def _reread(arguments: RunArguments, table: Shapes, at: Situation) -> int:
    """The whole model as it lies in its files; beside a GPU these are pages of the host."""
    is_read = arguments.finetuning.pissa_init and arguments.model.quantization_bit is not None
    if not is_read or at.device != "cpu":
        return 0
    return count(table) * (4 if "F32" in at.formats else 2)


def _mapped(arguments: RunArguments, at: Situation, form: _Format, frozen: Shapes) -> int:
    """Weights that nothing writes stay the pages of their files, where no cast is needed.

    Experts that lie one by one in the files are joined at loading: a copy.
    """
    is_same = at.formats == {{2: "BF16", 4: "F32"}[form.frozen]}
    if not is_same or at.device != "cpu":
        return 0
    quantized = arguments.model.is_quantized
    kept = {
        name: shape
        for name, shape in frozen.items()
        if not (quantized and is_linear(name, shape)) and not is_lone_expert(name)
    }
    return count(kept) * form.frozen


# ---- activations --------------------------------------------------------------------------------


def _activations(
    model: Decoder, trained: Trained, form: _Format, at: Situation, arguments: RunArguments
) -> int:
    """What backward needs of all layers, the final norm included."""
    num_layers = model.num_layers - trained.first_layer
    outside = at.num_tokens * model.hidden * (4 + form.compute)
    if at.recomputes:
        kept = 0 if arguments.model.use_unsloth_gc and at.device != "cpu" else form.stream
        return int(num_layers * at.num_tokens * model.hidden * kept + outside)
    layers = range(trained.first_layer, model.num_layers)
    per_token = sum(_of_layer(i, model, trained, form, at, arguments) for i in layers)
    return int(at.num_tokens * per_token + outside)


def _backward(
    model: Decoder, trained: Trained, form: _Format, at: Situation, arguments: RunArguments
) -> int:
    """The gradients inside one layer, what it recomputes, and one layer's dequantised matrix."""
    width = _widths(model)[0]
    per_token: float = (width + 2 * model.hidden) * form.compute
    if at.recomputes:
        last = model.num_layers - 1
        per_token += _of_layer(last, model, trained, form, at, arguments)
    matrix = model.hidden * width * form.compute if arguments.model.is_quantized else 0
    return int(at.num_tokens * per_token + matrix)


def _of_layer(
    index: int,
    model: Decoder,
    trained: Trained,
    form: _Format,
    at: Situation,
    arguments: RunArguments,
) -> float:
    """Bytes per token that backward needs of one layer."""
    compute, heads = form.compute, model.query + model.key
    normed = 2 * model.hidden if model.num_norms == 2 else 4 * model.hidden
    normed += heads if model.has_normed_heads else 0
    total = 4.0 * normed  # norms are computed in float32, from it
    if any("norm" in name and layer_of(name) for name in trained.own):
        total += normed * (2 if form.stream == 2 else 4)
    # rotated queries and keys, values, what came of them, and the sums of their weights
    total += (2 * model.query + model.key + model.value) * compute + 4 * model.num_heads
    copies = max(model.copies_of_scores, 1 if _is_padded(arguments) else 0)
    total += copies * model.num_heads * at.longest * 4
    inner, hidden_again = _widths(model)
    gates = 3 if model.is_gated or model.experts else 4
    total += (gates * inner + hidden_again) * compute
    experts = any(is_expert(n) and layer_of(n) for n in trained.own)
    if experts and model.experts is not None:
        total += (inner + hidden_again) * compute
    return total + _inputs(index, model, trained, form, arguments)


def _inputs(
    index: int, model: Decoder, trained: Trained, form: _Format, arguments: RunArguments
) -> float:
    """Bytes per token of the inputs of linear modules that train or have an adapter."""
    inner = _widths(model)[0] if model.experts is None else model.experts.shared
    consumers: dict[tuple[str, int], int] = {}
    adapters = 0
    for module in trained.in_layer(index):
        block = "attention" if "att" in module else "mlp"
        outward = module.rpartition(".")[2] in OUTWARD
        width = (model.query if block == "attention" else inner) if outward else model.hidden
        consumers[f"{block}{outward}", width] = consumers.get((f"{block}{outward}", width), 0) + 1
        adapters += 1
    tuning = arguments.finetuning
    is_lora = bool(trained.adapted)
    dropped = tuning.lora_dropout > 0 and is_lora
    total = 0.0
    for (_, width), number in consumers.items():
        copies = number if form.casts or dropped else 1
        total += width * copies * form.compute
        if dropped:
            total += width * number * form.mask
        if tuning.use_dora and is_lora:
            total += width * number * form.compute
    return total + (adapters * tuning.lora_rank * form.compute if is_lora else 0)


def _is_padded(arguments: RunArguments) -> bool:
    """Whether rows are padded and attention is computed plainly, all scores kept."""
    return arguments.model.flash_attn == "disabled"


def _widths(model: Decoder) -> tuple[int, int]:
    """Per token, the feed-forward part's inner width, and the outputs that experts keep."""
    experts = model.experts
    if experts is None:
        return model.intermediate, 0
    return experts.chosen * experts.intermediate + experts.shared, experts.chosen * model.hidden


# ---- the loss -----------------------------------------------------------------------------------


def _loss(model: Decoder, trained: Trained, form: _Format, at: Situation) -> int:
    """The chunk of logits, gradients of hidden states, and those of a head that trains."""
    targets = at.num_tokens
    head, states = model.vocabulary * model.hidden, targets * model.hidden
    chunk = min(CHUNK[at.device], targets * model.vocabulary * 4)
    rows = chunk // (4 * model.vocabulary)
    total: int = chunk + states * (4 + form.compute) + 3 * rows * model.hidden * 4
    trains = any(n.startswith("lm_head.") for n in trained.own) or (
        model.is_tied and any("embed" in n or "wte" in n for n in trained.own)
    )
    if trains:
        total += head * 4
    if at.device == "cpu" and form.compute < 4 and not trains:
        total += head * 4  # products of fewer bits give no sums in float32 there
    if at.device == "cuda" and form.compute < 4:
        total += chunk // 2
    return total
