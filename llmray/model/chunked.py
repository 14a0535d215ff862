"""Log-probabilities of targets from their hidden states, without ever holding all logits.

Shape suffixes: n targets, C targets of one chunk, D hidden size, V vocabulary. With x the logits
after scale, cap and temperature, log p(y) = x_y - logsumexp(x); this form is right to 1e-7 where a
float32 log_softmax over a large vocabulary is off by 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# one chunk's logits: a larger chunk reads the head's weight less often
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}


@dataclass(frozen=True)
class Form:
    """How logits follow from the head's product z: slope * z, or cap * tanh(slope * z / cap)."""

    slope: float = 1.0
    cap: float | None = None

    def at(self, temperature: float) -> Form:
        """This form with its logits divided by `temperature`."""
        cap = None if self.cap is None else self.cap / temperature
        return Form(self.slope / temperature, cap)

    def apply(self, product: Tensor) -> Tensor:
        """The logits of the head's `product`."""
        logits = product if self.slope == 1 else product * self.slope
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class Wanted:
    """What is wanted beside log-probabilities."""

    entropy: bool = False
    top1: bool = False


@dataclass
class Habit:
    """Whether the objective has so far weighed all log-probabilities alike, as cross entropy does.

    Then the forward pass can do the backward pass's work for a head that trains: three matrix
    products instead of four. Only a cost depends on it, no result.
    """

    is_uniform: bool = True


@dataclass(frozen=True)
class Outputs:
    """Per target: log p, and where wanted the entropy and whether it was the likeliest token."""

    logprobs: Tensor  # (n,)
    entropy: Tensor | None = None  # (n,)
    is_top1: Tensor | None = None  # (n,)


def linear_outputs(
    hidden: Tensor,
    head: nn.Linear,
    target_ids: Tensor,
    form: Form,
    wanted: Wanted,
    habit: Habit | None = None,
) -> Outputs:
    """The outputs of a plain linear head at hidden states (n, D), by chunks of targets."""
    operands = (hidden, head.weight, head.bias, target_ids, form, wanted)
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):
        return Outputs(*_TrainableHead.apply(*operands, habit or Habit(is_uniform=False)))
    return Outputs(*_FrozenHead.apply(*operands))


def module_outputs(
    hidden: Tensor, head: nn.Module, target_ids: Tensor, form: Form, wanted: Wanted, width: int
) -> Outputs:
    """As `linear_outputs` for any module of `width` logits; chunks are recomputed in backward."""

    def of_chunk(hidden: Tensor, target_ids: Tensor) -> tuple[Tensor | None, ...]:
        found = logits_outputs(form.apply(head(hidden).float()), target_ids, wanted)
        return found.logprobs, found.entropy, found.is_top1

    rows = _rows_per_chunk(width, hidden.device)
    # without targets it is one empty chunk: the head's parameters take part in every step
    pairs = zip(hidden.split(rows), target_ids.split(rows), strict=True)
    parts = [checkpoint(of_chunk, chunk, ids, use_reentrant=False) for chunk, ids in pairs]
    logprobs, entropy, is_top1 = zip(*parts, strict=True)
    return Outputs(
        torch.cat(logprobs),
        torch.cat(entropy) if wanted.entropy else None,
        torch.cat(is_top1) if wanted.top1 else None,
    )


def logits_outputs(logits: Tensor, target_ids: Tensor, wanted: Wanted) -> Outputs:
    """The outputs of whole logits (n, V), through torch's own autograd."""
    log_sums = logits.logsumexp(1)
    logprobs = logits.gather(1, target_ids[:, None]).squeeze(1) - log_sums
    entropy = is_top1 = None
    if wanted.entropy:
        all_logprobs = logits - log_sums[:, None]
        entropy = -(all_logprobs.exp() * all_logprobs).sum(1)
    if wanted.top1:
        is_top1 = logits.argmax(1) == target_ids
    return Outputs(logprobs, entropy, is_top1)


class _FrozenHead(torch.autograd.Function):
    """Forward also computes d(output) / d(hidden); backward only multiplies by it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        form: Form,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        head = _Head(weight, bias, form, _product_dtype(weight))
        collected = _Collected(hidden, head, wanted)
        needs_gradient = ctx.needs_input_grad[0]
        slopes = entropy_slopes = None
        if needs_gradient:
            slopes = hidden.new_empty(hidden.shape, dtype=head.dtype)
            entropy_slopes = torch.empty_like(slopes) if wanted.entropy else None
        for chunk in head.chunks(hidden, target_ids, wanted):
            collected.take(chunk)
            ones = torch.ones_like(chunk.logprobs)
            if entropy_slopes is not None:
                entropy_slopes[chunk.rows] = head.to_hidden(chunk.gradient(None, ones))
            if slopes is not None:
                slopes[chunk.rows] = chunk.slopes(ones)
        ctx.save_for_backward(slopes, entropy_slopes)
        ctx.dtype = hidden.dtype
        return collected.returned(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total = None
        for grad, slopes in zip(grads, ctx.saved_tensors, strict=False):
            if grad is not None:
                part = grad[:, None] * slopes
                total = part if total is None else total + part
        return (None if total is None else total.to(ctx.dtype), *[None] * 5)


class _TrainableHead(torch.autograd.Function):
    """Backward computes each chunk's logits again, for the gradients of hidden states and head.

    Where the habit is uniform, forward computes both gradients for weights of one; backward then
    only multiplies, if all weights are equal indeed. On a GPU asking that would make it wait.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        form: Form,
        wanted: Wanted,
        habit: Habit,
    ) -> tuple[Tensor | None, ...]:
        ctx.form, ctx.product_dtype, ctx.habit = form, _product_dtype(weight), habit
        head = _Head(weight, bias, form, ctx.product_dtype)
        collected = _Collected(hidden, head, wanted)
        is_eager = habit.is_uniform and not wanted.entropy and hidden.device.type == "cpu"
        ctx.grads = _HeadGrads(head, hidden) if is_eager else None
        for chunk in head.chunks(hidden, target_ids, wanted):
            collected.take(chunk)
            if ctx.grads is not None:
                ctx.grads.add(chunk, torch.ones_like(chunk.logprobs), None)
        ctx.save_for_backward(hidden, weight, bias, target_ids)
        return collected.returned(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids = ctx.saved_tensors
        of_logprob, of_entropy, _ = grads
        ready, ctx.grads = ctx.grads, None
        if ready is not None and of_logprob is not None:
            ctx.habit.is_uniform = bool((of_logprob == of_logprob[:1]).all())
            if ctx.habit.is_uniform:
                return ready.times(of_logprob[:1].sum(), bias)
        head = _Head(weight, bias, ctx.form, ctx.product_dtype)
        found = _HeadGrads(head, hidden)
        for chunk in head.chunks(hidden, target_ids, Wanted(entropy=of_entropy is not None)):
            found.add(
                chunk,
                None if of_logprob is None else of_logprob[chunk.rows],
                None if of_entropy is None else of_entropy[chunk.rows],
            )
        return found.times(None, bias)


class _HeadGrads:
    """Gradients of hidden states, weight and bias, filled chunk by chunk."""

    def __init__(self, head: _Head, hidden: Tensor) -> None:
        self._head = head
        self._states = hidden
        self._dtype = head.original_dtype
        self._hidden = torch.zeros_like(hidden, dtype=head.dtype)
        self._weight = torch.zeros_like(head.weight, dtype=head.dtype)
        self._bias = torch.zeros(len(head.weight), dtype=head.dtype, device=hidden.device)

    def add(self, chunk: _Chunk, of_logprob: Tensor | None, of_entropy: Tensor | None) -> None:
        gradient = chunk.gradient(of_logprob, of_entropy)
        self._hidden[chunk.rows] = self._head.to_hidden(gradient)
        self._head.add_to_weight(self._weight, gradient, self._states[chunk.rows])
        if self._head.bias is not None:
            self._bias += gradient.sum(0)

    def times(self, factor: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """What backward returns; the gradients are used up."""
        if factor is not None:
            for total in (self._hidden, self._weight, self._bias):
                total.mul_(factor)
        bias_grad = None if bias is None else self._bias.to(bias.dtype)
        return (
            self._hidden.to(self._states.dtype),
            self._weight.to(self._dtype),
            bias_grad,
            *[None] * 4,
        )


class _Head:
    """A linear head whose products run in `product_dtype` and accumulate in float32 or better."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, form: Form, product_dtype: torch.dtype
    ) -> None:
        self.weight = weight.to(product_dtype)  # (V, D)
        self.original_dtype = weight.dtype
        self.bias = bias
        self.form = form
        self.dtype = torch.promote_types(product_dtype, torch.float32)

    def chunks(self, hidden: Tensor, target_ids: Tensor, wanted: Wanted) -> Iterator[_Chunk]:
        """The chunks of all targets; each is valid until the next one is asked for."""
        num_targets = len(target_ids)
        size = min(_rows_per_chunk(len(self.weight), hidden.device), num_targets)
        buffer = None
        if hidden.device.type == "cpu" and size:  # elsewhere torch keeps freed memory by itself
            buffer = hidden.new_empty((size, len(self.weight)), dtype=self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, num_targets, max(size, 1)):
                rows = slice(start, min(start + size, num_targets))
                logits = self._logits(hidden[rows], buffer)
                yield _Chunk(self, rows, logits, target_ids[rows], wanted)

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """(C, D) gradient of hidden states from the (C, V) gradient of the head's product."""
        return self._product(gradient, self.weight)

    def add_to_weight(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """Add to the (V, D) gradient of the weight what one chunk contributes."""
        if self.weight.dtype == self.dtype:
            total.addmm_(gradient.T, hidden.to(self.dtype))
        else:
            total += self._product(gradient.T, hidden)

    def _logits(self, hidden: Tensor, buffer: Tensor | None) -> Tensor:
        """(C, V) in `dtype`; in `buffer` where there is one."""
        if buffer is None:
            logits = self._product(hidden, self.weight.T)
        else:
            logits = buffer[: len(hidden)]
            torch.mm(hidden.to(self.dtype), self.weight.T, out=logits)
        if self.bias is not None:
            logits += self.bias
        if self.form.slope != 1:
            logits *= self.form.slope
        if self.form.cap is not None:
            logits.div_(self.form.cap).tanh_().mul_(self.form.cap)
        return logits

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        low = self.weight.dtype
        if low == self.dtype:
            return left.to(low) @ right.to(low)
        return torch.mm(left.to(low), right.to(low), out_dtype=self.dtype)


class _Chunk:
    """The logits of some targets, normalised in place, and the gradients that follow."""

    def __init__(
        self, head: _Head, rows: slice, logits: Tensor, target_ids: Tensor, wanted: Wanted
    ) -> None:
        self.head = head
        self.rows = rows
        self.targets = target_ids[:, None]  # (C, 1)
        self.is_top1 = logits.argmax(1) == target_ids if wanted.top1 else None
        self.top = logits.amax(1, keepdim=True)  # (C, 1)
        logits.sub_(self.top)
        chosen = logits.gather(1, self.targets)
        keeps_logits = wanted.entropy or head.form.cap is not None
        self.logits = logits.clone() if keeps_logits else None
        self.exps = logits.exp_()
        self.sums = self.exps.sum(1, keepdim=True)  # (C, 1)
        self.logprobs = (chosen - self.sums.log()).squeeze(1)  # (C,)

    def entropy(self) -> Tensor:
        """(C,) entropies in nats."""
        assert self.logits is not None
        mean = (self.exps * self.logits).sum(1, keepdim=True) / self.sums
        return (self.sums.log() - mean).squeeze(1)

    def slopes(self, ones: Tensor) -> Tensor:
        """(C, D) gradient of each log-probability with respect to its hidden state."""
        if self.head.form.cap is not None:
            return self.head.to_hidden(self.gradient(ones, None))
        mean = self.head.to_hidden(self.exps) / self.sums
        return (self.head.weight[self.targets.squeeze(1)] - mean) * self.head.form.slope

    def gradient(self, of_logprob: Tensor | None, of_entropy: Tensor | None) -> Tensor:
        """(C, V) gradient of the head's product, from those of the outputs.

        May overwrite what it is computed from: the log-probabilities' part comes last.
        """
        total = None
        if of_entropy is not None:
            assert self.logits is not None
            logprobs = self.logits - self.sums.log()
            total = (logprobs + self.entropy()[:, None]).mul_(self.exps)
            total.mul_(-of_entropy[:, None] / self.sums)
        if of_logprob is not None:
            weights = of_logprob[:, None].to(self.exps.dtype)
            part = self.exps.mul_(-weights / self.sums)
            part.scatter_add_(1, self.targets, weights)
            total = part if total is None else total.add_(part)
        assert total is not None
        if self.head.form.cap is not None:
            assert self.logits is not None
            total.mul_(1 - ((self.logits + self.top) / self.head.form.cap) ** 2)
        return total if self.head.form.slope == 1 else total.mul_(self.head.form.slope)


class _Collected:
    """The outputs of all targets, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, head: _Head, wanted: Wanted) -> None:
        size = len(hidden)
        self.logprobs = hidden.new_empty(size, dtype=head.dtype)
        self.entropy = torch.empty_like(self.logprobs) if wanted.entropy else None
        self.is_top1 = hidden.new_empty(size, dtype=torch.bool) if wanted.top1 else None

    def take(self, chunk: _Chunk) -> None:
        self.logprobs[chunk.rows] = chunk.logprobs
        if self.entropy is not None:
            self.entropy[chunk.rows] = chunk.entropy()
        if self.is_top1 is not None and chunk.is_top1 is not None:
            self.is_top1[chunk.rows] = chunk.is_top1

    def returned(self, ctx: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        if self.is_top1 is not None:
            ctx.mark_non_differentiable(self.is_top1)
        return self.logprobs, self.entropy, self.is_top1


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What the head multiplies in; float32 on CPUs, where products of less give no float32 sums."""
    if weight.device.type == "cpu":
        return torch.promote_types(weight.dtype, torch.float32)
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _rows_per_chunk(width: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * width))
