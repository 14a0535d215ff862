"""Rewards of texts and conversations: the one scoring function of loop, command, actors and server.

    Scorer.load(arguments).score(["<|im_start|>user ... <|im_end|>"])

A reward is read at the last token. Its model is a causal language model with a value head, in the
run's template as in training, or a sequence classifier of a hub with its own tokenizer and chat
template. How the texts of many callers come into common forward passes is for `batcher`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import getLogger
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmray import hub
from llmray.arguments.run import RunArguments
from llmray.data.build import half_a_character
from llmray.data.collate import collate, split
from llmray.data.conversation import Conversation, RowError
from llmray.data.encoding import Encoder
from llmray.data.features import FEATURES
from llmray.data.plain_text import PlainText
from llmray.data.planning import end_token, renderer_of
from llmray.data.row_features import FeatureOptions, Outcome, RowFeatures
from llmray.data.shards import Sample
from llmray.data.templates import Renderer
from llmray.data.tokenizer import load_tokenizer, plain_text, tokenizer_json
from llmray.errors import DataError, RewardError
from llmray.model import embedding, load, tuning, value_head
from llmray.model.attention import why_not_flat
from llmray.model.classifier import is_classifier, load_classifier
from llmray.model.head import TokenModel
from llmray.train.generate import max_positions
from llmray.train.parallel import default_device
from llmray.train.precision import inference_dtype

log = getLogger("llmray")

Ids = np.ndarray  # (T,) int32

# tokens of one forward pass, padding counted
MAX_TOKENS = {"cpu": 2048, "cuda": 32768}


class Forward(Protocol):
    """A model that scores: the rewards, (B,) float32, of B sequences in one forward pass."""

    is_flat: bool

    def __call__(self, sequences: Sequence[Ids]) -> Tensor:
        """The reward of each sequence; every one has at least one token."""
        ...


class HeadForward:
    """Scores by the value head of a token model that only scores.

    Args:
        model: on its device.
        pad_id: fills rectangles, of models that take no flat rows.
    """

    def __init__(self, model: TokenModel, pad_id: int) -> None:
        self.model = model
        self.is_flat = model.flat
        self._pad_id = pad_id
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Ids]) -> Tensor:
        """See `Forward`."""
        samples = [Sample(ids, np.zeros(len(ids), np.bool_)) for ids in sequences]
        batch = collate(samples, flat=self.is_flat, pad_id=self._pad_id)
        self.model.eval()
        scores: Tensor | None = self.model(batch.to(self._device)).scores
        assert scores is not None, "the model only scores"
        return scores


class ClassifierForward:
    """Scores by the one logit of a sequence classifier, right-padded, in its own implementation."""

    is_flat = False

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._own_pad_id: int | None = model.config.get_text_config().pad_token_id

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Ids]) -> Tensor:
        """See `Forward`."""
        pad_id = self._pad_id(sequences)
        shape = len(sequences), max(map(len, sequences))
        ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        device = self.model.device
        outputs = self.model(
            torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
        )
        logits: Tensor = outputs.logits
        return logits[:, 0].float()

    def _pad_id(self, sequences: Sequence[Ids]) -> int:
        """The id that pads; a classifier finds the last token of a text by it.

        A model whose configuration names none gets one that no sequence has, or the last token of
        a text that ends with the end-of-text token would not be found.
        """
        if self._own_pad_id is not None:
            return self._own_pad_id
        used = {int(token) for sequence in sequences for token in np.unique(sequence)}
        free = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.get_text_config().pad_token_id = free
        return free


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text, and whether some were cut off to fit."""

    ids: Ids
    is_cut: bool = False


@dataclass(frozen=True)
class Scorer:
    """Texts and conversations to rewards; may be called from several threads.

    Attributes:
        forward: the model.
        encoder: its tokenizer.
        renderer: writes conversations as in training.
        options: of conversations: cutoff_len and how longer ones are cut.
        max_positions: the most tokens of a text, None where that is not bounded.
        max_tokens: of one forward pass.
        plain: the special tokens that are plain text where conversations have them.
    """

    forward: Forward
    encoder: Encoder
    renderer: Renderer
    options: FeatureOptions
    max_positions: int | None
    max_tokens: int
    plain: PlainText | None = None
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @classmethod
    def load(cls, arguments: RunArguments) -> Scorer:
        """The reward model of a run, its adapters merged.

        Raises:
            LlmrayError: something is missing, damaged or does not fit.
        """
        model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
        tokenizer = load_tokenizer(model_dir, arguments.model, arguments.data.template)
        device = torch.device("cpu") if arguments.training.use_cpu else default_device(0)
        dtype = inference_dtype(arguments.model.infer_dtype, device)
        if is_classifier(load.load_config(model_dir, arguments.model)):
            found = load_classifier(model_dir, arguments.model, dtype=dtype, device=device)
            model = tuning.apply(found, arguments, is_trainable=False, upcast=False)
            return cls.of(ClassifierForward(model), model, tokenizer, arguments)
        model = load.load_model(
            model_dir,
            arguments.model,
            dtype=dtype,
            device=device,
            gradient_checkpointing=False,
            cutoff_len=arguments.data.cutoff_len,
        )
        is_flat = why_not_flat(model) is None
        head = value_head.require(arguments, model_dir, model)
        embedding.require_room(model, tokenizer)
        tuned = tuning.apply(model, arguments, is_trainable=False, upcast=False)
        scoring = TokenModel(tuned, flat=is_flat, value_head=head, only_scores=True)
        return cls.of(HeadForward(scoring, tokenizer.pad_token_id), tuned, tokenizer, arguments)

    @classmethod
    def of(
        cls, forward: Forward, model: nn.Module, tokenizer: Any, arguments: RunArguments
    ) -> Scorer:
        """The same of a model and a tokenizer that are loaded already."""
        data = arguments.data
        renderer = renderer_of(data, tokenizer, "kto")
        assert renderer is not None, "answers are written in a format"
        kind = next(model.parameters()).device.type
        plain = plain_text(tokenizer, arguments.model)
        return cls(
            forward=forward,
            encoder=Encoder(tokenizer_json(tokenizer), plain),
            renderer=renderer,
            options=FeatureOptions(
                data.cutoff_len, data.truncation, end_token=end_token(data, tokenizer)
            ),
            max_positions=max_positions(model),
            max_tokens=max(data.cutoff_len, MAX_TOKENS.get(kind, MAX_TOKENS["cuda"])),
            plain=plain,
        )

    def score(self, texts: Sequence[str]) -> list[float]:
        """The rewards of whole texts, prompt and response, as they come out of a template.

        Raises:
            DataError: a text has no token; its number is said.
            RewardError: a reward is not finite; the number of the text is said.
        """
        encoded = self.encode(texts)
        empty = next((number for number, text in enumerate(encoded) if not len(text.ids)), None)
        if empty is not None:
            raise DataError(f"text {empty} (counted from 0) has no token. A text is required.")
        return _checked(self.run([text.ids for text in encoded]))

    def score_conversations(self, conversations: Sequence[Conversation]) -> list[float]:
        """The rewards of the last responses of conversations.

        Raises:
            DataError: a conversation cannot be written, has an empty response or is too long;
                its number is said.
            RewardError: a reward is not finite; the number is said.
        """
        sequences = []
        for number, found in enumerate(self.encode_conversations(conversations)):
            if isinstance(found, RowError):
                raise DataError(f"conversation {number} (counted from 0): {found}")
            sequences.append(found.ids)
        return _checked(self.run(sequences))

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[Encoded]:
        """The tokens of texts, none added; what has more than the model can take keeps its start.

        Args:
            texts: whole, in Unicode.
            max_length: a lower limit.
        """
        ids, bounds = self.encoder.encode(texts)
        limits = [limit for limit in (max_length, self.max_positions) if limit is not None]
        limit = min(limits, default=len(ids))
        found = []
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            kept = min(stop, start + limit)
            found.append(Encoded(ids[start:kept], kept < stop))
        return found

    def encode_conversations(
        self, conversations: Sequence[Conversation], *, allows_empty: bool = False
    ) -> list[Encoded | RowError]:
        """The tokens of conversations with their last response, cut as in training.

        Args:
            conversations: each ends with a response.
            allows_empty: whether a response that says nothing is one.

        Returns: in the order of the conversations; a `RowError` for one that has no response, that
            the template cannot write or that is too long for `truncation` error or drop.
        """
        wrong = [_problem(one, allows_empty=allows_empty) for one in conversations]
        asked = [one for one, error in zip(conversations, wrong, strict=True) if error is None]
        if self.plain is not None:
            asked = [self.plain.hidden(one) for one in asked]
        built = iter(FEATURES["kto"].build(asked, self.encoder, self.renderer, self.options))
        return [self._encoded(next(built)) if error is None else error for error in wrong]

    def _encoded(self, row: Outcome) -> Encoded | RowError:
        if isinstance(row, RowError):
            return row
        if isinstance(row, RowFeatures) and row.targets:
            return Encoded(row.input_ids, row.is_truncated)
        return RowError(
            f"of the response nothing is left within cutoff_len={self.options.cutoff_len}. "
            "Required: a whole prompt with some of its response. Raise cutoff_len, or set "
            "truncation: structure."
        )

    def run(self, sequences: Sequence[Ids]) -> list[float]:
        """The rewards of token sequences, in their order; not finite where the model says so.

        Sequences share forward passes of at most `max_tokens` tokens, one at least in each.
        """
        scores = [math.nan] * len(sequences)
        for group in self._groups([len(ids) for ids in sequences]):
            with self._lock:
                found = self.forward([sequences[number] for number in group]).tolist()
            for number, score in zip(group, found, strict=True):
                scores[number] = score
        return scores

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """The numbers of the sequences of each forward pass."""
        if not self.forward.is_flat:
            return split(lengths, self.max_tokens)
        groups: list[list[int]] = []
        room = 0
        for number, length in enumerate(lengths):
            if not groups or length > room:
                groups.append([])
                room = self.max_tokens
            groups[-1].append(number)
            room -= length
        return groups


def _problem(conversation: Conversation, *, allows_empty: bool) -> RowError | None:
    """Why a conversation cannot be scored, whatever the template."""
    last = conversation.messages[-1]
    if not (allows_empty or last.content.strip() or last.thought or last.calls):
        return RowError("the response is empty. Required: text to score.")
    return half_a_character(conversation)


def _checked(scores: list[float]) -> list[float]:
    wrong = next((number for number, score in enumerate(scores) if not math.isfinite(score)), None)
    if wrong is not None:
        raise RewardError(
            f"the reward of text {wrong} (counted from 0) is {scores[wrong]}. A finite number is "
            "required: score it with infer_dtype: float32, or take an earlier checkpoint."
        )
    return scores
