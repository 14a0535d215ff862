"""The value head: a linear map from a hidden state to one number, and its file.

Trained and read in float32, whatever the model's own dtype. Which hidden states it reads is
`head`'s business.
"""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmray import hub, store
from llmray.arguments.run import RunArguments
from llmray.errors import ModelError
from llmray.model.attention import causal_lm

log = getLogger("llmray")

FILE = "value_head.safetensors"
OTHER_FILE = "value_head.bin"  # of older releases of LLaMA-Factory
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


class ValueHead(nn.Module):
    """One number for a hidden state, in float32.

    Args:
        hidden_size: of the states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """The numbers, (n,) float32, of hidden states (n, D) of any dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            found: Tensor = self.summary(hidden.float())
        return found.squeeze(-1)


def create(model: PreTrainedModel, seed: int | None) -> ValueHead:
    """A new head for `model`, on its device; random by `seed` alone, all zeros for None.

    Random weights have deviation 1 / sqrt(D + 1), as in https://arxiv.org/abs/2009.01325: a state
    that a norm has scaled gets a number of about 1. The bias is 0. A critic begins with zeros: what
    numbers at random explain of the returns is less than nothing, and they are all that the first
    advantages would show.
    """
    head = ValueHead(hidden_size(model))
    with torch.no_grad():
        if seed is None:
            head.summary.weight.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            deviation = (head.summary.in_features + 1) ** -0.5
            head.summary.weight.normal_(0.0, deviation, generator=generator)
        head.summary.bias.zero_()
    return head.to(model.device)


def load(directory: Path | str, model: PreTrainedModel) -> ValueHead | None:
    """The head that lies beside a model or an adapter, None where none does.

    Args:
        directory: the folder; LLaMA-Factory's files are read too.
        model: the head is for; it goes to its device.

    Raises:
        ModelError: the file is damaged, holds something else, or does not fit the model.
    """
    path = next((p for name in (FILE, OTHER_FILE) if (p := Path(directory) / name).is_file()), None)
    if path is None:
        return None
    tensors = _read(path)
    head = ValueHead(hidden_size(model))
    expected = {WEIGHT: head.summary.weight, BIAS: head.summary.bias}
    for name, parameter in expected.items():
        if name not in tensors:
            raise ModelError(
                f"{path} has no {name}; it holds {', '.join(tensors) or 'nothing'}. A value head "
                f"with {WEIGHT} and {BIAS} is required: name the folder that stage rm wrote."
            )
        found = tensors[name].float()
        if found.shape != parameter.shape:
            raise ModelError(
                f"{name} in {path} is of shape {tuple(found.shape)}, and the model's hidden states "
                f"ask for {tuple(parameter.shape)}. The value head of this very model is required: "
                "correct model_name_or_path or adapter_name_or_path."
            )
        if not found.isfinite().all():
            raise ModelError(
                f"{name} in {path} holds numbers that are not finite. A whole value head is "
                "required: take an earlier checkpoint."
            )
        with torch.no_grad():
            parameter.copy_(found)
    log.info("value head of %s", path)
    return head.to(model.device)


def find(arguments: RunArguments, model_dir: Path, model: PreTrainedModel) -> ValueHead | None:
    """The head of a run's model: beside its last adapter, else beside the model; None if none.

    Raises:
        ModelError: as `load`.
    """
    return load(_place(arguments, model_dir), model)


def require(arguments: RunArguments, model_dir: Path, model: PreTrainedModel) -> ValueHead:
    """The same where there must be one.

    Raises:
        ModelError: there is none, or as `load`.
    """
    head = find(arguments, model_dir, model)
    if head is not None:
        return head
    output_dir = arguments.training.output_dir
    hint = "Train one with stage: rm, and name its folder as adapter_name_or_path"
    if output_dir is not None and (Path(output_dir) / FILE).is_file():
        is_adapter = (Path(output_dir) / hub.CONFIGS["adapter"]).is_file()
        key = "adapter_name_or_path" if is_adapter else "model_name_or_path"
        hint = f"This run wrote one: add {key}={output_dir}"
    raise ModelError(
        f"{_place(arguments, model_dir)} has no {FILE}, and its model is no sequence classifier: "
        f"it gives no reward. {hint}, or take a reward model of a hub."
    )


def _place(arguments: RunArguments, model_dir: Path) -> Path:
    names = arguments.model.adapter_name_or_path
    return hub.resolve(names[-1], arguments.model, kind="adapter") if names else model_dir


def write(head: ValueHead, directory: Path) -> None:
    """Write the head's file into a folder, by the names that LLaMA-Factory reads.

    Raises:
        StoreError: it cannot be written.
    """
    weights = {WEIGHT: head.summary.weight, BIAS: head.summary.bias}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with store.explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / FILE, metadata={"format": "pt"})


def freeze_output_head(model: nn.Module) -> None:
    """Let the head that predicts tokens train no longer, where its weights are its own.

    For a model that only scores: no gradient reaches it, and ranks would wait for one.
    """
    base = causal_lm(model)
    head = base.get_output_embeddings()
    if head is None:
        return
    embeddings = {id(p) for p in base.get_input_embeddings().parameters()}
    own = [p for p in head.parameters() if p.requires_grad and id(p) not in embeddings]
    for parameter in own:
        parameter.requires_grad_(False)
    if own:
        count = sum(p.numel() for p in own)
        log.info("of these, the %s of the head that predicts tokens stay as they are", f"{count:,}")


def hidden_size(model: PreTrainedModel) -> int:
    """How many numbers the decoder's last hidden states have."""
    config = model.config.get_text_config()
    # of models that project their states before the head (opt)
    projected = getattr(config, "word_embed_proj_dim", None)
    return int(projected or config.hidden_size)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, EOFError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the value head {path} is damaged ({first_line}). A whole file is required: copy it "
            "again, or take an earlier checkpoint."
        ) from error
    found = held.items() if isinstance(held, dict) else ()
    return {name: tensor for name, tensor in found if isinstance(tensor, Tensor)}
