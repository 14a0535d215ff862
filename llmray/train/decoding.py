"""Token by token with a cache of keys and values; rows that have ended leave the batch.

Each row's draws come from a seed of its own, so a response does not depend on which others are
sampled beside it (but for the last bits of its logits). For models whose cache holds keys and
values alone; `generate` says how responses are asked for, and takes transformers' way elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KEPT_SHARE = 7 / 8  # of rows that go on: with fewer the others are taken out of the cache
ROOM = 128  # tokens for which the cache has room beyond those that are there when it grows


class Draw(Protocol):
    """The part of `generate.Sampling` that decides about one token."""

    @property
    def draws(self) -> bool: ...  # noqa: D102 (as the attributes below)
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def top_p(self) -> float: ...  # noqa: D102
    @property
    def top_k(self) -> int: ...  # noqa: D102
    @property
    def repetition_penalty(self) -> float: ...  # noqa: D102
    @property
    def stop_ids(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def pad_id(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Decoded:
    """Responses to R prompts.

    Attributes:
        rows: R lists of tokens, each with the one that ends it where that came.
        logprobs: of each of these, nats at the temperature, before `top_k` and `top_p`; None where
            nothing is drawn or repetition is punished.
    """

    rows: list[list[int]]
    logprobs: list[list[float]] | None


def why_not_decoded(model: PreTrainedModel) -> str | None:
    """The reason why `decode` cannot run `model`, None where it can."""
    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
        return "its state is more than keys and values"
    if not model._supports_default_dynamic_cache():
        return "its cache is its own"
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "its cache holds more than keys and values"
    taken = inspect.signature(type(model).forward).parameters
    missing = {"past_key_values", "attention_mask"} - set(taken)
    return f"its forward takes no {', '.join(sorted(missing))}" if missing else None


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    draw: Draw,
    seeds: Sequence[int],
) -> Decoded:
    """A response to each prompt.

    Args:
        model: in eval mode, under its own attention.
        prompts: token ids, each at least one; padded on the left together.
        budgets: most tokens of each response, each at least one.
        draw: how a token is chosen.
        seeds: of each row's draws.
    """
    state = _State.start(model, prompts, draw)
    limits = torch.tensor(budgets, device=model.device)
    stops = torch.tensor(draw.stop_ids, device=model.device, dtype=torch.long)
    uniforms = _uniforms(budgets, seeds).to(model.device) if draw.draws else None
    tokens = torch.full((len(prompts), max(budgets)), draw.pad_id, device=model.device)
    has_shares = draw.draws and draw.repetition_penalty == 1.0
    logprobs = torch.zeros(tokens.shape, device=model.device) if has_shares else None
    goes_on = torch.ones(len(prompts), dtype=torch.bool, device=model.device)  # of rows still there
    for t in range(max(budgets)):
        logits = state.logits()
        chosen = choose(logits, draw, None if uniforms is None else uniforms[state.rows, t])
        tokens[state.rows, t] = torch.where(goes_on, chosen, tokens[state.rows, t])
        if logprobs is not None:
            logprobs[state.rows, t] = logprobs_of(chosen, logits, draw.temperature)
        goes_on = goes_on & ~torch.isin(chosen, stops) & (t + 1 < limits[state.rows])
        left = int(goes_on.sum())
        if not left:
            break
        state.add(chosen)
        if left <= KEPT_SHARE * len(goes_on):
            state.keep(goes_on.nonzero().squeeze(1))
            goes_on = goes_on[goes_on]
    pairs = zip(tokens.tolist(), budgets, strict=True)
    rows = [_cut(row[:n], draw.stop_ids) for row, n in pairs]
    if logprobs is None:
        return Decoded(rows, None)
    told = zip(rows, logprobs.tolist(), strict=True)
    return Decoded(rows, [said[: len(row)] for row, said in told])


class _Roomy(DynamicLayer):
    """Keys and values of one layer in tensors with room: a token is written, the rest stays."""

    keys: Any  # (R, heads, T, size)
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor] = []  # (R, heads, room, size) of keys and of values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in those of new tokens; returns all, as parts of what is kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self._rooms or self._rooms[0].shape[-2] < stop:
            kept: list[Tensor | None] = [self.keys, self.values] if start else [None, None]
            pairs = zip(kept, (key_states, value_states), strict=True)
            self._rooms = [_with_room(old, new, stop + ROOM) for old, new in pairs]
        keys, values = (room[..., :stop, :] for room in self._rooms)
        keys[..., start:, :] = key_states
        values[..., start:, :] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        super().batch_select_indices(indices)
        self._rooms = []


def _with_room(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """A tensor (R, heads, length, size) like `new` that begins with `old`."""
    room = new.new_empty(*new.shape[:-2], length, new.shape[-1])
    if old is not None:
        room[..., : old.shape[-2], :] = old
    return room


def _cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_Roomy() if type(each) is DynamicLayer else each for each in cache.layers]
    return cache


@dataclass
class _State:
    """What the model needs for the next token of the rows that are still there."""

    model: PreTrainedModel
    cache: DynamicCache
    rows: Tensor  # (R,) which prompt each row answers
    ids: Tensor  # (R, 1), at first (R, T): what the model has not read yet
    mask: Tensor  # (R, T) of all that it has read or is about to
    positions: Tensor  # as ids
    seen: Tensor | None  # (R, V) tokens so far, where repetition is punished
    penalty: float
    extra: dict[str, Any]
    takes_positions: bool

    @classmethod
    def start(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], draw: Draw) -> _State:
        width, device = max(map(len, prompts)), model.device
        gaps = [width - len(prompt) for prompt in prompts]
        pairs = list(zip(prompts, gaps, strict=True))
        ids = torch.tensor([[draw.pad_id] * gap + list(p) for p, gap in pairs], device=device)
        mask = torch.tensor([[0] * gap + [1] * len(p) for p, gap in pairs], device=device)
        taken = inspect.signature(type(model).forward).parameters
        seen = None
        if draw.repetition_penalty != 1.0:
            size = model.config.get_text_config().vocab_size
            counts = torch.zeros(len(prompts), size, device=device, dtype=torch.long)
            seen = counts.scatter_add_(1, ids, mask) > 0  # padding is not seen
        return cls(
            model=model,
            cache=_cache(model),
            rows=torch.arange(len(prompts), device=device),
            ids=ids,
            mask=mask,
            positions=(mask.cumsum(1) - 1).clamp_min(0),
            seen=seen,
            penalty=draw.repetition_penalty,
            extra={"logits_to_keep": 1} if "logits_to_keep" in taken else {},
            takes_positions="position_ids" in taken,
        )

    def logits(self) -> Tensor:
        """(R, V) float32, of the next token."""
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        result = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
            **self.extra,
        )
        logits: Tensor = result.logits[:, -1].float()
        if self.seen is None:
            return logits
        # https://arxiv.org/abs/1909.05858, section 4.1, as transformers has it
        punished = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(self.seen, punished, logits)

    def add(self, chosen: Tensor) -> None:
        """Go on with a token (R,) for each row."""
        self.ids = chosen[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], 1)
        self.positions = self.positions[:, -1:] + 1
        if self.seen is not None:
            self.seen.scatter_(1, self.ids, True)

    def keep(self, index: Tensor) -> None:
        """Go on with some of the rows alone."""
        self.cache.batch_select_indices(index)
        self.rows, self.ids, self.mask = self.rows[index], self.ids[index], self.mask[index]
        self.positions = self.positions[index]
        if self.seen is not None:
            self.seen = self.seen[index]


def choose(logits: Tensor, draw: Draw, uniform: Tensor | None) -> Tensor:
    """The token of each row: the likeliest, or the one that a number in [0, 1) stands for.

    Temperature, then the `top_k` likeliest, then of these the likeliest that together have `top_p`,
    as transformers has it; the number is looked up in the cumulated probabilities of what is left.

    Args:
        logits: (R, V) float32.
        draw: how.
        uniform: (R,) float64; None for the likeliest.
    """
    if uniform is None:
        return logits.argmax(1)
    scaled, order = logits / draw.temperature, None
    if 0 < draw.top_k < scaled.shape[1]:
        scaled, order = scaled.topk(draw.top_k, 1)
    elif draw.top_p < 1:
        scaled, order = scaled.sort(1, descending=True)
    shares = scaled.double().softmax(1)
    if draw.top_p < 1:
        assert order is not None, "sorted above"
        shares = torch.where(shares.cumsum(1) - shares < draw.top_p, shares, 0.0)
    cumulated = shares.cumsum(1)
    place = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    # rounding may lead behind the last token that has a share
    last = (shares > 0).int().cumsum(1).argmax(1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(1, place)).squeeze(1)


def logprobs_of(chosen: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """How likely tokens (R,) are by logits (R, V) at a temperature, (R,) nats."""
    scaled = logits if temperature == 1 else logits / temperature
    return scaled.gather(1, chosen[:, None]).squeeze(1) - scaled.logsumexp(1)


def _uniforms(budgets: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(R, T) numbers in [0, 1), each row's from its own seed."""
    drawn = torch.zeros(len(budgets), max(budgets), dtype=torch.float64)
    for row, budget, seed in zip(drawn, budgets, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        row[:budget] = torch.rand(budget, generator=generator, dtype=torch.float64)
    return drawn


def _cut(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]
