"""A model that answers conversations: loaded with its adapters, prompted as in training.

llmray.serve.answering.generate_answers(arguments, ["What is your name?"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from llmray import hub
from llmray.arguments.run import RunArguments
from llmray.data.conversation import Message, RowError
from llmray.data.encoding import Encoder
from llmray.data.plain_text import PlainText
from llmray.data.templates import Renderer, TemplateRenderer
from llmray.data.tokenizer import load_tokenizer, plain_text, renderer, tokenizer_json
from llmray.errors import DataError
from llmray.model import embedding, load, tuning, upcast
from llmray.train.generate import Sampling, generate, max_positions
from llmray.train.parallel import default_device
from llmray.train.precision import inference_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Answerer:
    """A model ready to answer.

    `skips_special` says whether special tokens are left out of the text, `plain` which of them are
    plain text in what is asked.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    sampling: Sampling
    skips_special: bool
    plain: PlainText | None = None

    @classmethod
    def load(cls, arguments: RunArguments) -> Answerer:
        """The model of a run with all its adapters merged.

        Raises:
            LlmrayError: if something is missing, damaged or does not fit.
        """
        model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
        tokenizer = load_tokenizer(model_dir, arguments.model, arguments.data.template)
        device = default_device(0)
        loaded = load.load_model(
            model_dir,
            arguments.model,
            dtype=inference_dtype(arguments.model.infer_dtype, device),
            device=device,
            gradient_checkpointing=False,
            cutoff_len=arguments.data.cutoff_len,
        )
        embedding.require_room(loaded, tokenizer)
        tuned = tuning.apply(loaded, arguments, is_trainable=False, upcast=False)
        if arguments.model.upcast_lmhead_output:
            upcast.upcast_logits(tuned)
        return cls.of(tuned, tokenizer, arguments)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, arguments: RunArguments) -> Answerer:
        """The same of a model and a tokenizer that are loaded already."""
        return cls(
            model=model,
            tokenizer=tokenizer,
            renderer=renderer(arguments.data, tokenizer),
            sampling=Sampling.of(arguments, model, tokenizer),
            skips_special=arguments.generating.skip_special_tokens,
            plain=plain_text(tokenizer, arguments.model),
        )

    def prompt_ids(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """The tokens after which the response to the last message begins.

        Args:
            messages: of the conversation so far.
            system: its system message; None for that of the run, else of the template.

        Raises:
            DataError: if the template cannot write these messages.
        """
        if self.plain is not None:
            messages, system = self.plain.hidden(list(messages)), self.plain.hidden(system)
        try:
            text = self.renderer.prompt(messages, system)
        except RowError as error:
            raise DataError(str(error)) from error
        if self.plain is not None:
            return list(map(int, self._encoder.encode([text])[0]))
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(tokenizer_json(self.tokenizer), self.plain)

    def fits(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the model has positions for a prompt and a whole response to it."""
        positions = max_positions(self.model)
        whole = self.sampling.budget(len(prompt_ids), None)
        return whole > 0 and self.sampling.budget(len(prompt_ids), positions) == whole

    def has_room(self, prompt_ids: Sequence[int]) -> bool:
        """Whether at least one token of a response has room after a prompt."""
        return self.sampling.budget(len(prompt_ids), max_positions(self.model)) > 0

    def text(self, ids: Sequence[int], *, plain: bool) -> str:
        """The text of a response; `plain` without special tokens whatever the run says."""
        skip = plain or self.skips_special
        # blanks before punctuation are the model's words, whatever an old tokenizer file says
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        )

    def said(self, ids: Sequence[int]) -> Message:
        """A response as the conversation goes on from it."""
        if not isinstance(self.renderer, TemplateRenderer) or not self.renderer.template.thought:
            return Message("assistant", self.text(ids, plain=True))
        # the marks of thoughts are special tokens of some models
        return self.renderer.read(str(self.tokenizer.decode(ids, skip_special_tokens=False)))

    def generate(
        self, prompts: Sequence[Sequence[int]], streamer: BaseStreamer | None = None
    ) -> list[list[int]]:
        """One response to each prompt, without the token that ended it.

        Args:
            prompts: token ids; answered together.
            streamer: is given the tokens as they come; for one prompt and no beams.
        """
        found = generate(self.model, prompts, self.sampling, streamer)
        return [response.ids for response in found]


def generate_answers(arguments: RunArguments, questions: Sequence[str]) -> list[str]:
    """The answers of a run's model, each question in a conversation of its own.

    Draws depend on the run's seed. `do_sample=false` takes the likeliest tokens.

    Raises:
        LlmrayError: if something is missing, damaged or does not fit.
    """
    answerer = Answerer.load(arguments)
    torch.manual_seed(arguments.training.seed)
    prompts = [answerer.prompt_ids([Message("user", question)]) for question in questions]
    return [answerer.text(ids, plain=False).strip() for ids in answerer.generate(prompts)]
