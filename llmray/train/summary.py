"""What a run came to: tokens, seconds by phase, model FLOPs, utilisation, peak memory.

Model FLOPs are those that the arithmetic of the model needs, whatever is recomputed or padded, as
in appendix B of https://arxiv.org/abs/2204.02311, with the factors of what truly trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from llmray.model.attention import causal_lm
from llmray.model.quantize import num_weights
from llmray.train.reading import Work


@dataclass(frozen=True)
class Peak:
    """Dense products that a device makes a second: of 16-bit and of 32-bit floats."""

    half: float
    single: float


# NVIDIA's data sheets of each product, without sparsity; the first name that the device's holds
PEAKS: dict[str, Peak] = {
    "B200": Peak(2250e12, 75e12),
    "H200": Peak(989.5e12, 67e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100": Peak(989.5e12, 67e12),
    "H800": Peak(989.5e12, 67e12),
    "H20": Peak(148e12, 44e12),
    "A100": Peak(312e12, 19.5e12),
    "A800": Peak(312e12, 19.5e12),
    "A30": Peak(165e12, 10.3e12),
    "A10": Peak(125e12, 31.2e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
    "V100": Peak(125e12, 15.7e12),
    "T4": Peak(65e12, 8.1e12),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOPs that the device makes a second at most, None where that is not known.

    Args:
        device_name: as torch gives it, such as `NVIDIA H100 80GB HBM3`.
        precision: fp32, or one of 16 bits.
    """
    words = device_name.replace("-", " ").split()
    for name, peak in PEAKS.items():
        if all(word in words for word in name.split()):
            return peak.single if precision == "fp32" else peak.half
    return None


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model: for a token, for a target (the head), for a pair of tokens it compares.

    `backward` is what the backward pass costs over the forward pass, in forward passes.
    """

    per_token: float
    per_target: float
    per_pair: float
    backward: float

    def of(self, work: Work) -> float:
        """FLOPs of training on `work`: forward and backward."""
        pairs = work.squares / 2  # a token sees those before it
        forward = (
            self.per_token * work.tokens + self.per_target * work.targets + self.per_pair * pairs
        )
        return forward * (1 + self.backward)


def cost_of(model: nn.Module) -> Cost:
    """The cost of a model whose trainable parameters are marked.

    A weight takes part in one multiplication and one addition for each token, that of an expert for
    the share of tokens it is chosen for. In the backward pass gradients of activations cost a
    forward pass, and those of weights the share of the weights that train.
    """
    base = causal_lm(model)
    head = base.get_output_embeddings()
    head_weights = {id(p) for p in head.parameters()} if head is not None else set()
    tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    body = trained = size_of_head = 0.0
    share = _share_of_experts(base)
    for name, parameter in base.named_parameters():
        if parameter.dim() < 2:
            continue
        if id(parameter) in head_weights:
            size_of_head += num_weights(parameter)
            trained += parameter.numel() * parameter.requires_grad
        elif id(parameter) not in tables:
            is_chosen = "experts" in name and "shared_expert" not in name
            size = num_weights(parameter) * (share if is_chosen else 1.0)
            body += size
            trained += size * parameter.requires_grad
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return Cost(
        per_token=2 * body,
        per_target=2 * size_of_head,
        per_pair=4 * heads * width * config.num_hidden_layers,
        backward=1 + trained / max(1.0, body + size_of_head),
    )


def _share_of_experts(base: PreTrainedModel) -> float:
    """The share of a mixture's experts that a token goes through; 1 where there is no mixture."""
    config = base.config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        number = getattr(config, name, None)
        if number:
            return (getattr(config, "num_experts_per_tok", None) or number) / number
    return 1.0


@dataclass(frozen=True)
class Phases:
    """Seconds of a run: before its first step, waiting for rows, in steps, and beside them."""

    start: float
    data: float
    training: float
    evaluation: float
    saving: float


@dataclass(frozen=True)
class Summary:
    """All figures of a run, those of all ranks together where they are sums."""

    tokens: int
    steps: int
    world_size: int
    phases: Phases
    flops: float
    peak_flops: float | None  # of one device, a second
    device: str
    peak_bytes: int

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs over what the devices could have made while training; None if not known."""
        seconds = self.phases.training + self.phases.data
        if self.peak_flops is None or seconds <= 0:
            return None
        return self.flops / (seconds * self.world_size * self.peak_flops)

    def metrics(self) -> dict[str, float]:
        """The figures by the names of all_results.json."""
        found: dict[str, float] = {
            f"seconds_{name}": round(seconds, 3) for name, seconds in vars(self.phases).items()
        }
        found["total_flos"] = self.flops
        if self.utilisation is not None:
            found["mfu"] = round(self.utilisation, 4)
        found["peak_memory_gb"] = round(self.peak_bytes / 1e9, 3)
        return found

    def lines(self) -> list[str]:
        """The figures in words."""
        seconds = self.phases.training + self.phases.data
        rate = self.flops / max(seconds, 1e-9) / self.world_size / 1e12
        known = "the device's peak is not known"
        if self.utilisation is not None and self.peak_flops is not None:
            known = f"MFU {self.utilisation:.1%} of {self.peak_flops / 1e12:g} of {self.device}"
        spent = ", ".join(f"{name} {s:.1f} s" for name, s in vars(self.phases).items())
        return [
            f"{self.tokens:,} tokens in {self.steps} steps; {spent}",
            f"{self.flops:.3g} model FLOPs, {rate:.3g} TFLOP/s a worker ({known}); peak memory "
            f"{self.peak_bytes / 1e9:.2f} GB",
        ]


def device_name(device: torch.device) -> str:
    """The name of a device as its maker calls it; its type where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
