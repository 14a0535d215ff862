"""A model that answers conversations: loaded with its adapters, prompted as in training.

llmray.serve.answering.generate_answers(arguments, ["What is your name?"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from llmray import hub
from llmray.arguments.generating import GeneratingArguments
from llmray.arguments.run import RunArguments
from llmray.data import templates
from llmray.data.conversation import Message, RowError
from llmray.data.templates import Renderer
from llmray.data.tokenizer import is_one_token, load_tokenizer, renderer
from llmray.errors import DataError
from llmray.model import load, tuning
from llmray.model.attention import native
from llmray.model.quiet import quiet
from llmray.train.parallel import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Answerer:
    """A model ready to answer.

    `stop_ids` are the tokens that end a response; `max_length` is how many tokens the model has
    positions for, None if that is not bounded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    generating: GeneratingArguments
    stop_ids: tuple[int, ...]
    max_length: int | None

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
            dtype=_dtype(arguments.model.infer_dtype, device),
            device=device,
            gradient_checkpointing=False,
        )
        tuned = tuning.apply(loaded, arguments, is_trainable=False, upcast=False)
        return cls.of(tuned, tokenizer, arguments)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, arguments: RunArguments) -> Answerer:
        """The same of a model and a tokenizer that are loaded already."""
        return cls(
            model=model,
            tokenizer=tokenizer,
            renderer=renderer(arguments.data, tokenizer),
            generating=arguments.generating,
            stop_ids=_stop_ids(model, tokenizer, arguments.data.template),
            max_length=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the response to the last message begins.

        Raises:
            DataError: if the template cannot write these messages.
        """
        try:
            text = self.renderer.prompt(messages)
        except RowError as error:
            raise DataError(str(error)) from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def fits(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the model has positions for a prompt and a whole response to it."""
        response = self.generating.max_new_tokens
        return self.max_length is None or len(prompt_ids) + response <= self.max_length

    def text(self, ids: Sequence[int], *, plain: bool) -> str:
        """The text of a response; `plain` without special tokens whatever the run says."""
        skip = plain or self.generating.skip_special_tokens
        # blanks before punctuation are the model's words, whatever an old tokenizer file says
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        )

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], streamer: BaseStreamer | None = None
    ) -> list[list[int]]:
        """One response to each prompt, without the token that ended it.

        Args:
            prompts: token ids; answered together.
            streamer: is given the tokens as they come; for one prompt and no beams.
        """
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        with quiet(), native(self.model):
            rows = self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=generation_config(self.generating, self.stop_ids, pad),
                streamer=streamer,
            )
        return [self._ended(row) for row in rows[:, width:].tolist()]

    def _ended(self, ids: list[int]) -> list[int]:
        stops = (i for i, token in enumerate(ids) if token in self.stop_ids)
        return ids[: next(stops, len(ids))]


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


def generation_config(
    generating: GeneratingArguments, stop_ids: Sequence[int], pad_id: int
) -> GenerationConfig:
    """Transformers' form of the run's settings; nothing is left to a model's own defaults."""
    settings: dict[str, Any] = {
        "num_beams": generating.num_beams,
        "repetition_penalty": generating.repetition_penalty,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
        "do_sample": generating.do_sample and generating.temperature > 0,
    }
    if settings["do_sample"]:
        settings |= {
            "temperature": generating.temperature,
            "top_p": generating.top_p,
            "top_k": generating.top_k,
        }
    if generating.num_beams > 1:
        settings["length_penalty"] = generating.length_penalty
    if generating.max_new_tokens:
        settings["max_new_tokens"] = generating.max_new_tokens
    else:
        settings["max_length"] = generating.max_length
    return GenerationConfig(**settings)


def _stop_ids(model: Any, tokenizer: Any, template: str | None) -> tuple[int, ...]:
    """The tokens that end a response: the template's, the tokenizer's and the model's own."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if template is not None:
        words = templates.stop_words(templates.find(template), tokenizer.eos_token or "")
        singles = [word for word in words if is_one_token(tokenizer, word)]
        found |= set(tokenizer.convert_tokens_to_ids(singles))
    return tuple(sorted(token for token in found if token is not None))


def _dtype(infer_dtype: str, device: torch.device) -> torch.dtype:
    if infer_dtype != "auto":
        return DTYPES[infer_dtype]
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16
