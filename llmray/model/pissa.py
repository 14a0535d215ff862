"""Adapters that start as the principal part of each weight, https://arxiv.org/abs/2404.02948.

W = U S V^T. With the r largest singular values, A = S_r^(1/2) V_r^T and B = U_r S_r^(1/2), each
over the root of the adapter's scale s; the base keeps W - s B A, so that nothing changes at first.
Beside low-bit weights W is the ordinary one, and what is left of it is rounded (QPiSSA).
What A and B were then (`Start`) belongs to the model from there on: a resume needs it to have the
same base again, and only with it is the adapter worth anything on the original weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmray.errors import ArgumentsError, CheckpointError
from llmray.model import quantize

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

FILE = "pissa_start.safetensors"  # beside an adapter that is not converted
ADAPTER = "default"


class Start(nn.Module):
    """What the adapter of the model that holds this was at first; without parameters of its own.

    Args:
        iterations: of the approximate decomposition; negative for the exact one.
        seed: of the approximate decomposition.
        converts: whether the adapter is saved as one for the original weights.
        ordinary: reads the model of ordinary weights whose low-bit ones the base holds; None where
            there is none.
    """

    def __init__(
        self,
        iterations: int,
        seed: int,
        *,
        converts: bool,
        ordinary: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.ordinary = ordinary
        self.iterations = iterations
        self.seed = seed
        self.converts = converts
        self.tensors: dict[
            str, Tensor
        ] = {}  # by their names in the adapter's file; (r, in), (out, r)

    @property
    def has_begun(self) -> bool:
        """Whether the base holds the residual."""
        return bool(self.tensors)

    def begin(self, model: nn.Module, agree: Callable[[Any], Any]) -> None:
        """Decompose the weights of `model`, unless that is done; all ranks call it.

        Args:
            model: whose adapter has changed nothing yet.
            agree: gives every rank what rank 0 passes.
        """
        if not self.has_begun:
            weights = self._weights(model)
            self._take_away(model, agree(self._decompose(model, weights)), weights)

    @torch.no_grad()
    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Make base and adapter of `model` those of a start that was kept.

        Raises:
            CheckpointError: if the model has started elsewhere.
        """
        if not tensors:
            return
        if self.has_begun:
            if tensors.keys() != self.tensors.keys() or any(
                not torch.equal(tensors[name].cpu(), kept) for name, kept in self.tensors.items()
            ):
                raise CheckpointError(
                    "the checkpoint's adapter started from another decomposition than this "
                    "run's. A resume needs the same adapter_name_or_path and PiSSA keys. Set "
                    "overwrite_output_dir: true to start anew."
                )
            return
        self._take_away(model, tensors, self._weights(model))

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The matrices (out, in) that have an adapter; of low-bit ones what they were rounded from.

        Those lie where the files are read, which may be another device.
        """
        found, source = {}, None
        for name, layer in lora_layers(model).items():
            module, is_turned = layer.get_base_layer(), layer.fan_in_fan_out
            if _is_rounded(module):
                if source is None:
                    assert self.ordinary is not None  # `attach` saw to it
                    source = self.ordinary()
                module = source.get_submodule(_short(name))
                is_turned = isinstance(module, Conv1D)
            weight = module.weight.detach()
            found[name] = weight.T if is_turned else weight
        return found

    @torch.no_grad()
    def _take_away(
        self, model: nn.Module, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> None:
        for name, layer in lora_layers(model).items():
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            down.copy_(tensors[f"{name}.lora_A.weight"])
            up.copy_(tensors[f"{name}.lora_B.weight"])
            weight, module = weights[name], layer.get_base_layer()
            part = layer.scaling[ADAPTER] * (up.double() @ down.double())
            if _is_rounded(module):
                quantize.replace(module, weight.to(part) - part)
            else:
                weight.copy_(weight.double() - part)
        self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def _decompose(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers = lora_layers(model)
        devices = {layer.get_base_layer().weight.device for layer in layers.values()}
        on_gpu = [device for device in devices if device.type == "cuda"]
        with torch.random.fork_rng(devices=on_gpu):
            torch.manual_seed(self.seed)
            for name, layer in layers.items():
                weight = weights[name].to(layer.get_base_layer().weight.device).float()
                down, up = principal(weight, layer.r[ADAPTER], self.iterations)
                root, kind = math.sqrt(layer.scaling[ADAPTER]), layer.lora_A[ADAPTER].weight.dtype
                found[f"{name}.lora_A.weight"] = (down / root).to(kind).cpu()
                found[f"{name}.lora_B.weight"] = (up / root).to(kind).cpu()
        return found


def principal(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The factors (rank, in) and (out, rank) whose product comes nearest to `weight` (out, in).

    Args:
        weight: float32.
        rank: at most the smaller side.
        iterations: of the randomised decomposition, https://arxiv.org/abs/0909.4061; negative for
            the exact one.
    """
    if iterations < 0:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, transposed = torch.svd_lowrank(weight, rank, niter=iterations)
        right = transposed.T
    root = values.sqrt()
    return (root[:, None] * right).contiguous(), (left * root).contiguous()


def attach(model: Any, start: Start) -> None:
    """Let peft's `model` carry `start`; its adapter has changed nothing yet.

    Raises:
        ArgumentsError: if a module that has an adapter cannot be decomposed.
    """
    base = model.get_base_model()
    shared = base.get_input_embeddings()
    for name, layer in lora_layers(model).items():
        target = layer.get_base_layer()
        short, rank = _short(name), layer.r[ADAPTER]
        if not hasattr(layer, "lora_A") or ADAPTER not in layer.lora_A:
            raise ArgumentsError(
                f"pissa_init=true with lora_target {short}, an embedding: linear modules alone are "
                "decomposed. Remove it from lora_target."
            )
        if _is_rounded(target) and start.ordinary is None:
            raise ArgumentsError(
                f"the model's files have the weights of {short} in low bits, and PiSSA takes a "
                "part of them away, which must go before they are rounded. Ordinary weights are "
                "required: name that model, with quantization_bit, or an adapter that was "
                "converted (pissa_convert: true)."
            )
        if target.weight is getattr(shared, "weight", None):
            raise ArgumentsError(
                f"pissa_init=true with lora_target {short}: its weight is the embedding's too, "
                "which would change with it. Remove it from lora_target."
            )
        shape = quantize.shape(target.weight)
        if rank > min(shape):
            raise ArgumentsError(
                f"pissa_init=true with rank {rank}, but {short} is a matrix of "
                f"{tuple(shape)}. At most its smaller side is required: lower "
                "lora_rank, or give this module its own in lora_rank_pattern."
            )
    model.add_module("pissa_start", start)
    depth = "pissa" if start.iterations < 0 else f"pissa_niter_{start.iterations}"
    model.peft_config[ADAPTER].init_lora_weights = depth


def _short(name: str) -> str:
    """What the model inside peft's calls a module."""
    return name.removeprefix("base_model.model.")


def _is_rounded(module: nn.Module) -> bool:
    """Whether a module's weights are in low bits, under whatever name."""
    weight = getattr(module, "weight", None)
    return weight is None or not weight.is_floating_point()


def of(model: nn.Module) -> Start | None:
    """What `model` carries of a start, if its adapter is one of PiSSA."""
    return next((module for module in model.modules() if isinstance(module, Start)), None)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The modules of peft's `model` that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def read(directory: Path) -> dict[str, Tensor]:
    """The start that lies beside an adapter; empty where there is none."""
    path = directory / FILE
    return load_file(path) if path.is_file() else {}


def complete(model: nn.Module, directory: Path) -> None:
    """Make a saved adapter one that means what it does in `model`.

    Converted, it is (B A - B0 A0) as matrices of twice the rank; otherwise its start is put beside
    it. An adapter that has not begun is an ordinary one.
    """
    start = of(model)
    if start is None:
        return
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    if start.has_begun and not start.converts:
        save_file(start.tensors, directory / FILE, metadata={"format": "pt"})
        return
    config["init_lora_weights"] = True
    if start.has_begun:
        config |= _doubled(config)
        weights = directory / "adapter_model.safetensors"
        save_file(_converted(load_file(weights), start.tensors), weights, metadata={"format": "pt"})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _converted(trained: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(trained)
    for name, first in start.items():
        first = first.to(trained[name].dtype)
        parts = [trained[name], first] if ".lora_A." in name else [trained[name], -first]
        found[name] = torch.cat(parts, dim=0 if ".lora_A." in name else 1).contiguous()
    return found


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ranks twice, and alphas so that each scale stays."""
    factor = math.sqrt(2) if config["use_rslora"] else 2
    return {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "alpha_pattern": {name: factor * a for name, a in config["alpha_pattern"].items()},
    }
