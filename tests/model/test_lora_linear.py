"""One operation for LoRA: outputs and gradients of peft's own, and what goes peft's way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from tiny import build_model
from torch import Tensor, nn

from llmray.model import lora_linear
from llmray.model.lora_linear import LoraLinear

TARGETS = ["q_proj", "v_proj", "down_proj"]


def tuned(**settings: Any) -> nn.Module:
    """A tiny model with an adapter that changes what it says."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, **settings)
    made = get_peft_model(build_model(), config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made


def layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def learned(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss."""
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (2, 7))
    logits = model(ids).logits
    model.zero_grad()
    logits.square().mean().backward()
    named = model.named_parameters()
    return logits.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_it_is_peft_s_layer(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(**settings)
    logits, gradients = learned(model)
    lora_linear.use(model)
    assert len(layers(model)) == 2 * len(TARGETS)
    monkeypatch.setattr(Linear, "forward", None)  # nothing goes peft's way
    found, slopes = learned(model)
    assert torch.allclose(found, logits, atol=1e-6)
    assert slopes.keys() == gradients.keys()
    assert any("lora_A" in name for name in slopes)
    for name, slope in slopes.items():
        assert torch.allclose(slope, gradients[name], atol=1e-7, rtol=1e-4), name


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    sizes = (2, 3, 5), (6, 5), (6,), (2, 5), (6, 2)
    x, w, bias, a, b = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    for each in (x, a, b):
        each.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear._Product.apply(x, w, bias, a, b, 1.5), (x, a, b)
    )


def hooked(model: nn.Module) -> None:
    for layer in layers(model):
        layer.lora_A["default"].register_forward_hook(lambda *args: None)


def widened(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if ".lora_" in name:
            module.to(torch.float64)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"lora_dropout": 0.5}, lambda model: model.train()),
        ({"use_dora": True}, lambda model: None),
        ({"lora_bias": True}, lambda model: None),
        ({}, hooked),
        ({}, lambda model: model.base_model.requires_grad_(True)),
        ({}, widened),
    ],
    ids=["dropout", "DoRA", "bias", "hooks", "trained weights", "dtypes"],
)
def test_what_it_does_not_know_goes_peft_s_way(
    settings: dict[str, Any],
    change: Callable[[nn.Module], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tuned(**settings)
    lora_linear.use(model)
    change(model)
    calls = []
    own = Linear.forward
    monkeypatch.setattr(
        Linear, "forward", lambda self, x: (calls.append(1), own(self, x))[1], raising=True
    )
    model(torch.tensor([[3, 4, 5]]))
    assert len(calls) == 2 * len(TARGETS)


def test_without_adapter_it_is_the_base() -> None:
    model = tuned()
    lora_linear.use(model)
    ids = torch.tensor([[3, 4, 5]])
    with model.disable_adapter():
        bare = model(ids).logits
    assert torch.equal(bare, build_model()(ids).logits)
    assert not torch.allclose(bare, model(ids).logits)


@torch.no_grad()
def test_folded_weights_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    lora_linear.use(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(ids).logits
    with lora_linear.folded(model):
        assert all(layer.llmray_folded is not None for layer in layers(model))
        assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert all(layer.llmray_folded is None for layer in layers(model))
    assert torch.equal(model(ids).logits, before)
    monkeypatch.setattr(lora_linear, "MOST_FOLDED_BYTES", 10)
    with lora_linear.folded(model):
        assert all(layer.llmray_folded is None for layer in layers(model))


def test_a_copy_is_its_own() -> None:
    model = tuned()
    lora_linear.use(model)
    other = copy.deepcopy(model)
    for layer in layers(other):
        nn.init.zeros_(layer.lora_B["default"].weight)
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.allclose(model(ids).logits, other(ids).logits)
    assert torch.allclose(other(ids).logits, build_model()(ids).logits, atol=1e-6)
