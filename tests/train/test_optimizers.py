"""Optimizers against arithmetic and transformers' own choice, parameter groups."""

import pytest
import torch
from torch import nn

from llmray.arguments.finetuning import FinetuningArguments
from llmray.arguments.optimizer import OptimizerArguments
from llmray.arguments.settings import OPTIMIZER_SETTINGS
from llmray.train.optimizers import OPTIMIZERS, build


def arguments(**keys):
    return OptimizerArguments(**keys)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)


def test_norms_and_biases_do_not_decay():
    model = Tiny()
    trainable = dict(model.named_parameters())
    optimizer = build(model, trainable, arguments(weight_decay=0.1))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in trainable.items()} == {
        "linear.weight": 0.1,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }


class Adapter(nn.Module):
    """Names as peft gives them."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.ones(2, 3))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.ones(3, 2))})
        self.norm = nn.LayerNorm(3)


def test_lora_plus_gives_b_and_embeddings_rates_of_their_own():
    model = nn.ModuleDict({"layer": Adapter()})
    trainable = dict(model.named_parameters())
    tuning = FinetuningArguments(loraplus_lr_ratio=16, loraplus_lr_embedding=1e-5)
    for name in ("adamw_torch", "adafactor", "sgd"):
        keys = arguments(learning_rate=0.01, weight_decay=0.1, optim=name)
        groups = build(model, trainable, keys, tuning).param_groups
        names = {id(p): n for n, p in trainable.items()}
        found = {
            names[id(p)]: (g["lr"], g["weight_decay"], g.get("name", ""))
            for g in groups
            for p in g["params"]
        }
        assert found == {
            "layer.lora_A.default.weight": (0.01, 0.1, ""),
            "layer.lora_B.default.weight": (0.01 * 16, 0.1, "lora_B"),
            "layer.lora_embedding_A.default": (1e-5, 0.1, "embedding"),
            "layer.lora_embedding_B.default": (1e-5, 0.1, "embedding"),
            "layer.norm.weight": (0.01, 0.0, ""),
            "layer.norm.bias": (0.01, 0.0, ""),
        }
        assert "name" not in groups[0]
        plain = build(model, trainable, keys).param_groups
        assert {group["lr"] for group in plain} == {0.01}


def test_one_adamw_update_by_hand():
    """First update of Adam: m / sqrt(v) = sign(g) up to eps; decay multiplies by 1 - lr * wd.

    w = 2, g = 3, lr = 0.1, wd = 0.5: 2 * (1 - 0.05) - 0.1 * 1 = 1.8.
    """
    for name in ("adamw_torch", "adamw_torch_fused"):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 2.0)
        keys = arguments(learning_rate=0.1, weight_decay=0.5, optim=name, adam_epsilon=1e-12)
        optimizer = build(model, dict(model.named_parameters()), keys)
        model.weight.grad = torch.full((1, 1), 3.0)
        optimizer.step()
        assert model.weight.item() == pytest.approx(1.8, abs=1e-6)


def test_each_optimizer_has_its_settings():
    assert set(OPTIMIZERS) == set(OPTIMIZER_SETTINGS)


THEIRS = {
    "adamw_torch": "",
    "adamw_torch_fused": "",
    "adafactor": "",
    "sgd": "momentum=0.9,nesterov=true",
    "adagrad": "lr_decay=0.1",
    "rmsprop": "momentum=0.5,alpha=0.9,centered=true",
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_updates_equal_those_of_transformers_choice(name, tmp_path):
    """Five updates beside the class and keywords that transformers' Trainer takes for the name."""
    from transformers import Trainer, TrainingArguments

    own = {"learning_rate": 0.03, "optim": name, "optim_args": THEIRS[name] or None}
    theirs = TrainingArguments(str(tmp_path), report_to="none", adam_beta2=0.9, **own)
    factory, keywords = Trainer.get_optimizer_cls_and_kwargs(theirs)
    results = []
    for kind in ("ours", "theirs"):
        torch.manual_seed(0)
        model = Tiny()
        groups = dict(model.named_parameters())
        if kind == "ours":
            optimizer = build(model, groups, arguments(adam_beta2=0.9, **own))
        else:
            whole = [{"params": list(groups.values()), "weight_decay": 0.0}]
            optimizer = factory(whole, **keywords)
        for step in range(5):
            loss = (model.norm(model.linear(torch.ones(2, 3) * (step + 1))) ** 3).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=1e-6)
