"""From a batch to log-probabilities and values: decoder, heads and temperature in one module.

The one module that training wraps; nothing else computes logits for a loss. How a model scales or
caps its logits comes from a table that is checked against the model's own logits when the module
is built; a model that the table gets wrong is asked for its own logits, at the targets alone.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmray.batch import Batch
from llmray.errors import ArgumentsError, ModelError
from llmray.model.attention import causal_lm, native, use_flat
from llmray.model.chunked import (
    Form,
    Habit,
    Outputs,
    Wanted,
    linear_outputs,
    logits_outputs,
    module_outputs,
)
from llmray.model.value_head import ValueHead

log = getLogger("llmray")

NUM_CHECKED = 8  # positions at which the head is compared with the model's own logits
LARGEST = 1000.0  # what hidden states are scaled to there, as logits, so that a cap on them shows

# fields of a configuration that multiply or divide the logits, and the one that caps them
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLY_BY_DIVISOR = {"hyperclovax"}  # model types whose field of that name multiplies


@dataclass(frozen=True)
class TokenOutput:
    """What the model says at a batch's n targets; logarithms are natural.

    `entropy` is that of the whole next-token distribution, `is_top1` says whether the target was
    the likeliest token; both only where asked for. `values` are those of a value head beside the
    model's own, at the positions that predict the targets. `aux_loss` is the mixture-of-experts
    loss times its coefficient, where the model's configuration asks for it.

    A model that only scores gives `scores` alone, each read at the last token of a sample; its
    `logprobs` are empty, `(0,)`.
    """

    logprobs: Tensor  # (n,) float32
    entropy: Tensor | None = None  # (n,) float32
    is_top1: Tensor | None = None  # (n,) bool
    values: Tensor | None = None  # (n,) float32
    aux_loss: Tensor | None = None  # scalar
    scores: Tensor | None = None  # (num_samples,) float32


class TokenModel(nn.Module):
    """From a batch to its `TokenOutput`, for a model of transformers or peft's wrapper of one.

    Args:
        model: the causal language model; stays `self.model`.
        flat: whether batches are flat rows; the model's attention is set accordingly.
        temperature: divides the logits.
        value_head: reads hidden states beside the model's own head.
        only_scores: no token is predicted: the value head reads the last token of each sample.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        flat: bool,
        temperature: float = 1.0,
        value_head: ValueHead | None = None,
        only_scores: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.flat = flat
        self.value_head = value_head
        self.only_scores = only_scores
        base = causal_lm(model)
        form = Form() if only_scores else logit_form(base)
        self.uses_own_head = not only_scores and not _form_is_right(base, form)
        if self.uses_own_head:
            log.info(
                "%s computes its logits in a way of its own: its own forward is used, which holds "
                "the logits of all targets at once",
                type(base).__name__,
            )
        self.form = (Form() if self.uses_own_head else form).at(temperature)
        self._habit = Habit()
        if flat:
            use_flat(model)

    def forward(self, batch: Batch, *, entropy: bool = False, top1: bool = False) -> TokenOutput:
        """The outputs at the targets of `batch`.

        Args:
            batch: a flat row where `self.flat`, else a padded rectangle.
            entropy, top1: what else is wanted.
        """
        if self.flat != (batch.segments is not None):
            raise ValueError(f"a {'flat row' if self.flat else 'padded batch'} is required")
        base = causal_lm(self.model)
        if self.only_scores:
            return self._scored(base, batch)
        wanted = Wanted(entropy, top1)
        outputs = self._own_outputs if self.uses_own_head else self._head_outputs
        return outputs(base, batch, wanted)

    def _scored(self, base: PreTrainedModel, batch: Batch) -> TokenOutput:
        assert self.value_head is not None, "a model that only scores has a value head"
        if batch.ends is None:
            raise ValueError("a batch with the ends of its samples is required")
        decoder = base.base_model
        result = decoder(batch.input_ids, **_inputs(decoder, base, batch))
        hidden = result.last_hidden_state.flatten(0, 1)[batch.ends]  # (num_samples, D)
        scores = self.value_head(hidden)
        return TokenOutput(
            scores.new_zeros(0), aux_loss=_aux_loss(base, result, batch), scores=scores
        )

    def _head_outputs(self, base: PreTrainedModel, batch: Batch, wanted: Wanted) -> TokenOutput:
        decoder, head = base.base_model, base.get_output_embeddings()
        result = decoder(batch.input_ids, **_inputs(decoder, base, batch))
        hidden = result.last_hidden_state.flatten(0, 1)[batch.targets]  # (n, D)
        if type(head) is nn.Linear:
            found = linear_outputs(hidden, head, batch.target_ids, self.form, wanted, self._habit)
        else:  # wrapped by peft or quantised
            width = base.config.get_text_config().vocab_size
            found = module_outputs(hidden, head, batch.target_ids, self.form, wanted, width)
        values = None if self.value_head is None else self.value_head(hidden)
        return _token_output(found, values, _aux_loss(base, result, batch))

    def _own_outputs(self, base: PreTrainedModel, batch: Batch, wanted: Wanted) -> TokenOutput:
        if self.value_head is not None:
            raise ModelError(
                f"{type(base).__name__} computes its logits in a way of its own, beside which no "
                "value head is built. Take a model with an ordinary head."
            )
        width = batch.input_ids.shape[1]
        columns, index = (batch.targets % width).unique(return_inverse=True)
        inputs = _inputs(base, base, batch)
        if _accepts(base, "logits_to_keep"):
            result = base(batch.input_ids, **inputs, logits_to_keep=columns)
            logits = result.logits
        else:
            result = base(batch.input_ids, **inputs)
            logits = result.logits[:, columns]
        chosen = logits[batch.targets // width, index].float()  # (n, V)
        found = logits_outputs(self.form.apply(chosen), batch.target_ids, wanted)
        return _token_output(found, None, _aux_loss(base, result, batch))


def _token_output(found: Outputs, values: Tensor | None, aux_loss: Tensor | None) -> TokenOutput:
    return TokenOutput(found.logprobs, found.entropy, found.is_top1, values, aux_loss)


def logit_form(model: PreTrainedModel) -> Form:
    """How the configuration says that logits follow from the head's product."""
    config = model.config.get_text_config()
    inverted = config.model_type in MULTIPLY_BY_DIVISOR
    slope = 1.0
    for name in (*MULTIPLIERS, *DIVISORS):
        factor = getattr(config, name, None)
        if factor is not None:
            slope *= 1 / factor if name in DIVISORS and not inverted else factor
    caps = (getattr(config, name, None) for name in CAPS)
    return Form(slope, next((cap for cap in caps if cap is not None), None))


def _inputs(module: nn.Module, base: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of a call of `module` on `batch`; what it does not know is left out."""
    inputs: dict[str, Any] = {"use_cache": False}
    if batch.segments is not None:
        inputs["segments"] = batch.segments
        inputs["position_ids"] = batch.position_ids
    else:
        inputs["attention_mask"] = batch.attention_mask
        if _accepts(module, "position_ids"):
            inputs["position_ids"] = batch.position_ids
    if balance(base) is not None:
        inputs["output_router_logits"] = True
    return inputs


def _accepts(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(type(module).forward).parameters


@torch.no_grad()
def _form_is_right(base: PreTrainedModel, form: Form) -> bool:
    """Whether head and form give the model's own logits, also where hidden states are large."""
    seen: list[Tensor] = []

    def amplify(module: nn.Module, args: Any, output: Any) -> Any:
        peak = head(output.last_hidden_state).float().abs().max().clamp_min(1e-6)
        output.last_hidden_state = (output.last_hidden_state * (LARGEST / peak)).to(base.dtype)
        seen.append(output.last_hidden_state)
        return output

    head, was_training = base.get_output_embeddings(), base.training
    if head is None or base.base_model is base:
        return False
    size = base.config.get_text_config().vocab_size
    ids = torch.arange(NUM_CHECKED, device=base.device)[None] * (size // NUM_CHECKED)
    hook = base.base_model.register_forward_hook(amplify)
    base.eval()
    low = _lowest_dtype(base)
    try:
        with native(base), _as_trained(base, low):
            own = base(ids, use_cache=False).logits.float()
            if len(seen) != 1:
                return False
            ours = form.apply(head(seen[0]).float())
    finally:
        hook.remove()
        base.train(was_training)
    limit = 1e-4 if low in (torch.float32, torch.float64) else 3e-2
    return bool((own - ours).abs().max() <= limit * own.abs().max())


def _lowest_dtype(base: PreTrainedModel) -> torch.dtype:
    """The dtype of the model's weights that has the fewest bits."""
    dtypes = {p.dtype for p in base.parameters() if p.is_floating_point()}
    return min(dtypes, key=lambda dtype: dtype.itemsize, default=base.dtype)


def _as_trained(base: PreTrainedModel, low: torch.dtype) -> AbstractContextManager[object]:
    """Autocast where layers that train are in float32 and the others in fewer bits."""
    is_mixed = any(p.is_floating_point() and p.dtype != low for p in base.parameters())
    if not is_mixed or low not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(base.device.type, dtype=low)


def balance(base: PreTrainedModel) -> float | None:
    """The coefficient of the auxiliary loss of a mixture of experts, None where there is none."""
    asked: float | None = getattr(base, "llmray_balance", None)
    if asked is not None:
        return asked or None
    config = base.config.get_text_config()
    wants = bool(getattr(config, "output_router_logits", False))
    # a model that asks for it and has no such loss is refused where the loss is made
    return float(getattr(config, "router_aux_loss_coef", 1.0)) if wants else None


def set_balance(model: nn.Module, coefficient: float) -> None:
    """Let `model` train with this coefficient, whatever its configuration says.

    Raises:
        ArgumentsError: if it has no experts, or no auxiliary loss of them.
    """
    base = causal_lm(model)
    if not _has_balance(base):
        raise ArgumentsError(
            f"moe_aux_loss_coef={coefficient:g}, but {type(base).__name__} has no loss that "
            "balances experts. A mixture of experts that has one is required: remove the key."
        )
    base.llmray_balance = coefficient


def _has_balance(base: PreTrainedModel) -> bool:
    module = sys.modules[type(base).__module__]
    counts = ("num_experts", "num_experts_per_tok")
    return hasattr(module, "load_balancing_loss_func") and all(hasattr(base, n) for n in counts)


def _aux_loss(base: PreTrainedModel, result: Any, batch: Batch) -> Tensor | None:
    """The load-balancing loss of the model's own module, times its coefficient."""
    coefficient = balance(base)
    if coefficient is None:
        return None
    if not _has_balance(base) or not result.router_logits:
        raise ModelError(
            f"output_router_logits is set, but {type(base).__name__} has no auxiliary loss. A "
            "mixture of experts that has one is required; write moe_aux_loss_coef: 0."
        )
    module: Any = sys.modules[type(base).__module__]
    loss: Tensor = module.load_balancing_loss_func(
        result.router_logits, base.num_experts, base.num_experts_per_tok, batch.attention_mask
    )
    return loss * coefficient
