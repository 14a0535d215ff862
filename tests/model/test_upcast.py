"""Single parts in float32, the loss that balances experts, and activations kept on the host."""

import pytest
import torch
from layouts import make_rows
from tiny import build_model, make_model
from torch.utils import checkpoint

from llmray.arguments.model import ModelArguments
from llmray.errors import ArgumentsError
from llmray.model import recompute, upcast
from llmray.model.head import TokenModel, set_balance
from llmray.model.load import load_model

ARCHS = ("llama", "qwen3", "gemma3_text", "qwen3_moe")


def shaken(arch):
    """A model in bfloat16 whose norms are not all ones, so that their rounding shows."""
    model = build_model(arch, amplify=2.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("arch", [*ARCHS, "gpt2"])
def test_norms_in_float32(arch):
    model, ids = shaken(arch), torch.arange(3, 40)[None]
    before = model(ids).logits
    norms = {n for n, _ in model.named_parameters() if "norm" in n or "ln_" in n}
    assert upcast.upcast_norms(model) == len(norms) > 0
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == norms
    after = model(ids).logits  # and it runs without autocast
    assert after.dtype == torch.bfloat16
    # these two compute their norms in float32 in any case
    assert torch.equal(before, after) == (arch in ("gemma3_text", "gpt2"))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids).logits, after, atol=0.1, rtol=0.1)


def test_norms_that_are_in_float32_stay_as_they_are():
    model, ids = build_model(), torch.arange(3, 40)[None]
    before = model(ids).logits
    assert upcast.upcast_norms(model) == 0
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_logits_in_float32(arch):
    model, ids = shaken(arch), torch.arange(3, 40)[None]
    before = model(ids).logits
    upcast.upcast_logits(model)
    after = model(ids).logits
    assert (before.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(after, before.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "qwen2_moe", "gpt_oss"])
def test_the_balancing_loss_is_the_models_own_times_the_coefficient(arch):
    rows, model = make_rows(), build_model(arch, amplify=3.0)
    token_model = TokenModel(model, flat=False)
    assert token_model(rows.padded).aux_loss is None
    set_balance(model, 0.5)
    half = token_model(rows.padded).aux_loss
    set_balance(model, 2.0)
    double = token_model(rows.padded).aux_loss
    torch.testing.assert_close(double, 4 * half)
    own = model(
        rows.padded.input_ids,
        attention_mask=rows.padded.attention_mask,
        output_router_logits=True,
        labels=rows.padded.input_ids,
        use_cache=False,
    )
    torch.testing.assert_close(double, 2 * own.aux_loss, atol=1e-4, rtol=1e-3)
    assert not getattr(model.config, "output_router_logits", False)  # nothing of it is saved


def test_a_coefficient_of_zero_is_a_value():
    rows, model = make_rows(), build_model("qwen3_moe", output_router_logits=True)
    token_model = TokenModel(model, flat=True)
    assert token_model(rows.flat).aux_loss > 0
    set_balance(model, 0.0)
    assert token_model(rows.flat).aux_loss is None


@pytest.mark.parametrize("arch", ["llama", "deepseek_v3"])
def test_models_without_that_loss_are_refused(arch):
    for coefficient in (0.0, 0.1):
        with pytest.raises(ArgumentsError, match="has no loss that balances experts"):
            set_balance(build_model(arch), coefficient)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_offloading_changes_no_number(arch, is_reentrant, tmp_path, monkeypatch):
    make_model(tmp_path, arch, amplify=3.0)
    rows, copies = make_rows(), []
    copy = recompute.save_on_cpu

    def counted(**settings):
        copies.append(settings)
        return copy(**settings)

    monkeypatch.setattr(recompute, "save_on_cpu", counted)
    found = []
    for offloads in (False, True):
        model = load_model(
            tmp_path,
            ModelArguments(use_unsloth_gc=offloads, use_reentrant_gc=is_reentrant),
            dtype=torch.float32,
            device=torch.device("cpu"),
            gradient_checkpointing=True,
        )
        model.train()
        output = TokenModel(model, flat=True)(rows.flat)
        output.logprobs.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert copies == [{"pin_memory": False}] * 2  # one for each of the two layers
    assert checkpoint.checkpoint is recompute.checkpoint
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)


def test_what_is_kept_is_each_layers_input(monkeypatch):
    """The hooks stand around a checkpoint: they see the input, not what the layer computes."""
    seen = []

    def noted(pin_memory):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (seen.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor
        )

    monkeypatch.setattr(recompute, "save_on_cpu", noted)
    model = build_model().train()
    recompute.recompute_activations(model, is_reentrant=False, offloads=True)
    model(torch.arange(3, 20)[None], use_cache=False).logits.sum().backward()
    assert seen.count((1, 17, 32)) == 2
    assert not any(64 in shape for shape in seen)  # of the MLP's width there is nothing
