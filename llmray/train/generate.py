"""Responses of a causal model to prompts of token ids, for chat, prediction and rollouts alike.

Prompts of different lengths are padded on the left, positions and mask follow; a response ends at
one of the stop tokens or when its budget is spent, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from llmray.data import templates
from llmray.data.tokenizer import is_one_token
from llmray.model import rope
from llmray.model.attention import causal_lm, native
from llmray.model.quiet import quiet
from llmray.train.decoding import Decoded, decode, why_not_decoded

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

LEAST_FOLDED = 8  # tokens of a response for which an adapter is added to the weights


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The names are those of the arguments of generation.

    `stop_ids` are the tokens that end a response, `pad_id` fills prompts. `max_length` counts the
    tokens of prompt and response and holds where `max_new_tokens` is 0. A temperature of 0 takes
    the likeliest token, as `do_sample` false does.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    max_new_tokens: int = 0
    max_length: int = 1024
    use_cache: bool = True

    @classmethod
    def of(cls, arguments: RunArguments, model: nn.Module, tokenizer: Any) -> Sampling:
        """What a run asks for of its model and tokenizer."""
        asked = arguments.generating
        return cls(
            stop_ids=stop_ids(model, tokenizer, arguments.data.template),
            pad_id=tokenizer.pad_token_id,
            do_sample=asked.do_sample,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            num_beams=asked.num_beams,
            repetition_penalty=asked.repetition_penalty,
            length_penalty=asked.length_penalty,
            max_new_tokens=asked.max_new_tokens,
            max_length=asked.max_length,
            use_cache=arguments.model.use_kv_cache,
        )

    @classmethod
    def for_evaluation(cls, arguments: RunArguments, model: nn.Module, tokenizer: Any) -> Sampling:
        """The same with the beams and the length of evaluation, where these are given."""
        training = arguments.training
        beams = arguments.data.eval_num_beams or training.generation_num_beams
        sampling = cls.of(arguments, model, tokenizer)
        if beams:
            sampling = replace(sampling, num_beams=beams)
        if training.generation_max_length:
            sampling = replace(
                sampling, max_new_tokens=0, max_length=training.generation_max_length
            )
        return sampling

    def budget(self, prompt_len: int, max_positions: int | None) -> int:
        """How many tokens the response to a prompt may have; 0 where the prompt leaves no room."""
        room = self.max_new_tokens or self.max_length - prompt_len
        if max_positions is not None:
            room = min(room, max_positions - prompt_len)
        return max(0, room)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; else the likeliest is taken."""
        return self.do_sample and self.temperature > 0

    def config(self, num_new_tokens: int) -> GenerationConfig:
        """Transformers' form of it; nothing is left to a model's own defaults."""
        settings: dict[str, Any] = {
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": list(self.stop_ids),
            "pad_token_id": self.pad_id,
            "do_sample": self.draws,
            "max_new_tokens": num_new_tokens,
            "use_cache": self.use_cache,
        }
        if settings["do_sample"]:
            settings |= {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        if self.num_beams > 1:
            settings["length_penalty"] = self.length_penalty
        return GenerationConfig(**settings)


@dataclass(frozen=True)
class Response:
    """The tokens of a response without the one that ended it, which is `stop_id`.

    `stop_id` is None where the budget was spent first. `logprobs` are those of all these tokens as
    they were drawn, nats at the temperature and before `top_k` and `top_p`; None where that is not
    known: see `decoding.Decoded`.
    """

    ids: list[int]
    stop_id: int | None
    logprobs: list[float] | None = field(default=None, compare=False)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Response]:
    """One response to each prompt, in their order; a prompt that leaves no room gets an empty one.

    The model is left in eval mode. Rows that have ended leave the batch, where the model's cache
    allows that and neither beams nor a streamer are asked for.

    Args:
        model: a causal model of transformers, or peft's wrapper of one.
        prompts: token ids, each at least one; answered together.
        sampling: how.
        streamer: is given the tokens as they come; for one prompt and no beams.
        seeds: of each prompt's draws, which then depend on nothing else; None: they follow torch's
            global state of random numbers.
    """
    positions = max_positions(model)
    budgets = [sampling.budget(len(prompt), positions) for prompt in prompts]
    answered = [number for number, budget in enumerate(budgets) if budget]
    responses = [Response([], None) for _ in prompts]
    if not answered:
        return responses
    base = causal_lm(model)
    base.eval()
    chosen = [list(prompts[number]) for number in answered]
    limits = [budgets[number] for number in answered]
    own = None if seeds is None else [seeds[number] for number in answered]
    with quiet(), native(base):
        is_plain = streamer is None and sampling.num_beams == 1 and sampling.use_cache
        if is_plain and why_not_decoded(base) is None:
            drawn = torch.randint(2**62, (len(chosen),)).tolist() if own is None else own
            with _folded(base, max(limits)):
                found = decode(base, chosen, limits, sampling, drawn)
        else:
            with _seeded(own, base.device):
                rows = _by_transformers(base, chosen, sampling, max(limits), streamer)
            found = Decoded([row[:n] for row, n in zip(rows, limits, strict=True)], None)
    for place, (number, row) in enumerate(zip(answered, found.rows, strict=True)):
        said = None if found.logprobs is None else found.logprobs[place]
        responses[number] = replace(ended(row, sampling.stop_ids), logprobs=said)
    return responses


def _folded(base: PreTrainedModel, num_new_tokens: int) -> AbstractContextManager[None]:
    """Inside, a LoRA adapter is part of the weights, where that is worth while."""
    if num_new_tokens < LEAST_FOLDED or not hasattr(base, "peft_config"):
        return nullcontext()
    from llmray.model.lora_linear import folded  # peft takes a second to import

    return folded(base)


def _by_transformers(
    base: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    num_new_tokens: int,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """The responses' tokens, filled up to one length."""
    width = max(map(len, prompts))
    ids = [[sampling.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    rows = base.generate(
        torch.tensor(ids, device=base.device),
        attention_mask=torch.tensor(mask, device=base.device),
        generation_config=sampling.config(num_new_tokens),
        streamer=streamer,
    )
    found: list[list[int]] = rows[:, width:].tolist()
    return found


@contextmanager
def _seeded(seeds: Sequence[int] | None, device: torch.device) -> Iterator[None]:
    """Torch's random numbers by these seeds together, and as they were afterwards; None: as is."""
    if seeds is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(hash(tuple(seeds)) % 2**63)
        yield


def ended(ids: Sequence[int], stop_ids: Sequence[int]) -> Response:
    """The response in tokens of which the first stop token ends it."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return Response(list(ids[:end]), None if end is None else ids[end])


def max_positions(model: nn.Module) -> int | None:
    """How many tokens a model has positions for, None where that is not bounded."""
    return rope.max_positions(causal_lm(model).config)


def stop_ids(model: nn.Module, tokenizer: Any, template: str | None) -> tuple[int, ...]:
    """The tokens that end a response: the template's, the tokenizer's and the model's own."""
    config = causal_lm(model).generation_config
    own = config.eos_token_id if config is not None else None
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if template is not None:
        words = templates.stop_words(templates.find(template), tokenizer.eos_token or "")
        singles = [word for word in words if is_one_token(tokenizer, word)]
        found |= set(tokenizer.convert_tokens_to_ids(singles))
        for word in set(words) - set(singles):
            log.warning(
                "template=%s stops at %s, which is no token of this tokenizer: generation goes on",
                template,
                word,
            )
    return tuple(sorted(token for token in found if token is not None))
