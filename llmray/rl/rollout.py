"""From prompts to responses: which are sampled side by side, by which seeds, and as which texts.

How a batch is sampled is `train.generate`'s; what the responses are worth is for `rewards`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmray.batch import Batch
from llmray.data.collate import collate
from llmray.data.conversation import Conversation, Message
from llmray.data.shards import Sample
from llmray.rl.handles import Answer
from llmray.train.generate import Response, Sampling


@dataclass(frozen=True)
class Prompt:
    """What a response is asked for.

    `row` is its number in the data, `place` that among the prompts of its step over all ranks,
    `said` its conversation.
    """

    ids: Sequence[int]
    row: int
    place: int
    said: Conversation | None = None

    @property
    def label(self) -> str:
        """The response that the data has, empty where it has none."""
        label = None if self.said is None else self.said.label
        return "" if label is None else label.content


@dataclass(frozen=True)
class Rollout:
    """S responses of this rank; those to one prompt follow one another.

    A response holds the token that ended it. Rectangles over T tokens of the longest response are
    filled on the right. `logprobs` are those of its tokens as they were drawn, see `Response`.
    """

    prompts: list[Prompt]  # S
    responses: list[list[int]]  # S, of token ids
    ended_S: Tensor  # bool: a stop token came before the budget was spent
    answers: list[Answer]  # S
    logprobs: list[list[float] | None] = field(default_factory=list)  # S

    @property
    def lengths_S(self) -> Tensor:
        """Tokens of each response, int64."""
        return torch.tensor([len(response) for response in self.responses], dtype=torch.long)

    @property
    def mask_ST(self) -> Tensor:
        """Where a token of a response is."""
        lengths_S = self.lengths_S
        width = int(lengths_S.max()) if len(lengths_S) else 0
        return torch.arange(width) < lengths_S[:, None]

    @property
    def drawn_ST(self) -> Tensor:
        """Log-probabilities of the tokens as they were drawn, NaN where that is not known."""
        found_ST = torch.full(self.mask_ST.shape, torch.nan)
        for row, said in enumerate(self.logprobs):
            if said is not None:
                found_ST[row, : len(said)] = torch.tensor(said)
        return found_ST

    @property
    def num_tokens(self) -> int:
        """Of prompts and responses."""
        return sum(len(prompt.ids) for prompt in self.prompts) + int(self.lengths_S.sum())

    @property
    def num_squares(self) -> int:
        """The sum of squared lengths of prompt and response."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return sum((len(prompt.ids) + len(response)) ** 2 for prompt, response in pairs)

    def batch(
        self,
        rows: Sequence[int],
        *,
        flat: bool,
        pad_id: int,
        given_ST: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """Some of the responses with their prompts, whose tokens are the targets.

        Args:
            rows: which; none give one token and no target.
            flat: a flat row; else padded.
            pad_id: fills the rectangle.
            given_ST: what is known of the tokens, (S, T) each; becomes `Batch.given`, (n,) each.
        """
        samples = []
        for row in rows:
            prompt, response = self.prompts[row].ids, self.responses[row]
            ids = np.array([*prompt, *response], np.int32)
            samples.append(Sample(ids, np.arange(len(ids)) >= len(prompt)))
        made = collate(samples, flat=flat, pad_id=pad_id)
        index = torch.tensor(rows, dtype=torch.long)
        chosen = self.mask_ST[index]
        given = {name: known[index][chosen] for name, known in (given_ST or {}).items()}
        if "reference" not in given:
            return replace(made, given=given)
        # said here, the engine does not ask the reference once more
        sums = torch.zeros(made.num_samples, dtype=torch.float64)
        sums.index_add_(0, made.target_sample, given["reference"].double())
        return replace(made, given=given, reference=sums)


class Samples(Protocol):
    """What samples responses."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Response]:
        """One response to each prompt, drawn by its seed."""
        ...


@dataclass(frozen=True)
class Texts:
    """Tokens as text.

    Args:
        tokenizer: the policy's.
        skips_special: whether special tokens are left out of what people read.
        reads: tells a response's thought from what it says.
        ending: the token that ends a response of a conversation, and what the format writes after
            it; a reward model was trained on text that has both.
    """

    tokenizer: Any
    skips_special: bool = True
    reads: Callable[[str], Message] | None = None
    ending: tuple[int, str] | None = None

    def answer(self, name: str, prompt: Prompt, response: Sequence[int]) -> Answer:
        """What is scored."""
        whole = [*prompt.ids, *response]
        conversation = None
        if prompt.said is not None:
            last = self._message(response)
            conversation = replace(prompt.said, messages=(*prompt.said.messages, last), label=None)
        return Answer(
            id=name,
            prompt=self._decoded(prompt.ids, self.skips_special),
            response=self._decoded(response, self.skips_special),
            text=self._decoded(whole, False) + self._after(prompt, response),
            label=prompt.label,
            num_tokens=len(whole),
            conversation=conversation,
        )

    def _after(self, prompt: Prompt, response: Sequence[int]) -> str:
        """What the format writes after a response that has ended."""
        if self.ending is None or prompt.said is None or not response:
            return ""
        stop_id, after = self.ending
        return after if response[-1] == stop_id else ""

    def _message(self, response: Sequence[int]) -> Message:
        text = self._decoded(response, True)
        return Message("assistant", text) if self.reads is None else self.reads(text)

    def _decoded(self, ids: Sequence[int], skips_special: bool) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skips_special, clean_up_tokenization_spaces=False
            )
        )


@dataclass(frozen=True)
class Plan:
    """How a rank samples.

    Attributes:
        sampling: how tokens are drawn.
        num_samples: responses to each prompt.
        side_by_side: responses that are sampled in one batch.
        seed: of the run.
        name: comes before the ids of answers, so that those of different runs differ.
    """

    sampling: Sampling
    num_samples: int = 1
    side_by_side: int = 16
    seed: int = 0
    name: str = "ppo"


@dataclass
class Sampler:
    """Responses to prompts by a policy; an answer goes out as soon as its batch is done.

    Args:
        policy: samples.
        texts: of its tokens.
        plan: how.
    """

    policy: Samples
    texts: Texts
    plan: Plan

    def sample(
        self,
        prompts: Sequence[Prompt],
        rollout: int,
        send: Callable[[Sequence[int], Sequence[Answer]], None],
    ) -> Rollout:
        """Responses to `prompts`, each drawn by (seed, rollout, row, sample) alone.

        Args:
            prompts: of this rank.
            rollout: number of the rollout.
            send: is given each batch when it is done: numbers of the responses, and these.
        """
        plan = self.plan
        asked = [prompt for prompt in prompts for _ in range(plan.num_samples)]
        names = [
            f"{plan.name}-{rollout}-{prompt.row}-{sample}"
            for prompt in prompts
            for sample in range(plan.num_samples)
        ]
        found: dict[int, tuple[Response, Answer]] = {}
        for rows in self._batches(asked):
            seeds = [_seed(f"{plan.seed}-{names[row]}") for row in rows]
            responses = self.policy.generate([asked[row].ids for row in rows], plan.sampling, seeds)
            pairs = list(zip(rows, responses, strict=True))
            answers = [self.texts.answer(names[row], asked[row], _tokens(r)) for row, r in pairs]
            send(rows, answers)
            found |= {row: (r, a) for (row, r), a in zip(pairs, answers, strict=True)}
        ordered = [found[row] for row in range(len(asked))]
        return Rollout(
            prompts=asked,
            responses=[_tokens(response) for response, _ in ordered],
            ended_S=torch.tensor([r.stop_id is not None for r, _ in ordered], dtype=torch.bool),
            answers=[answer for _, answer in ordered],
            logprobs=[response.logprobs for response, _ in ordered],
        )

    def _batches(self, asked: Sequence[Prompt]) -> list[list[int]]:
        """Numbers of responses that are sampled together: prompts of like length, longest first."""
        order = sorted(range(len(asked)), key=lambda row: -len(asked[row].ids))
        size = self.plan.side_by_side
        return [order[start : start + size] for start in range(0, len(order), size)]


def _tokens(response: Response) -> list[int]:
    return response.ids if response.stop_id is None else [*response.ids, response.stop_id]


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
