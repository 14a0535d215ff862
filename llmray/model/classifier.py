"""Reward models of a hub: sequence classifiers with one label, loaded to score."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError
from llmray.model import kernels
from llmray.model.load import load_config
from llmray.model.quiet import quiet
from llmray.model_code import optional_imports

ENDING = "ForSequenceClassification"


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a model's configuration names a sequence classifier as what it was saved as."""
    return any(str(name).endswith(ENDING) for name in config.architectures or ())


def load_classifier(
    model_dir: Path | str,
    model_args: ModelArguments,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The sequence classifier of a folder, in eval mode.

    Args:
        model_dir: from `hub.resolve`.
        model_args: which attention, whether code may run.
        dtype: of all weights.
        device: where they go.

    Raises:
        ModelError: a file is missing or damaged, or the model has not one label but several.
    """
    directory, config = Path(model_dir), load_config(model_dir, model_args)
    choice = kernels.prepare(model_args.flash_attn, device, dtype)
    if config.num_labels != 1:
        raise ModelError(
            f"the classifier in {directory} has {config.num_labels} labels. A reward model has "
            "one: take another model."
        )
    if model_args.quantization_bit is not None:
        raise ModelError(
            f"quantization_bit={model_args.quantization_bit} of a sequence classifier is not "
            "built. Remove quantization_bit."
        )
    try:
        with quiet(), optional_imports():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                attn_implementation=choice.kernel.own,
                trust_remote_code=model_args.trust_remote_code,
                output_loading_info=True,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{directory} cannot be loaded: {first_line}. A sequence classifier that transformers "
            "knows is required: check the folder, flash_attn and trust_remote_code."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of the classifier's weights, first {missing[0]}. "
            "Whole weights are required: complete the folder."
        )
    classifier: PreTrainedModel = model.to(device).eval()
    return classifier
