"""PiSSA: the decomposition, conversion to the original weights, adapters that go on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import build_model
from tuned import logprobs, saved, shake, tuned

from llmray.errors import ArgumentsError, CheckpointError, ModelError
from llmray.model import pissa

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt2"]


def alone(given):
    """What rank 0 of a world of one agrees on."""
    return given


def begun(model=None, **keys):
    model = tuned(model, pissa_init=True, **keys)
    pissa.of(model).begin(model, alone)
    return model


def base(arch="llama"):
    return build_model(arch, amplify=2.0)


def product(layer):
    return (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )


def test_the_adapter_starts_as_the_principal_part_and_the_base_as_the_rest():
    """A diagonal of 4, 3, 2, 1 at rank 2: the adapter is diag(4, 3, 0, 0), the base the rest."""
    model = base()
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0] + [0.0] * 28)))
    layer = begun(model, lora_rank=2, lora_alpha=6, pissa_iter=-1).get_base_model()
    layer = layer.model.layers[0].self_attn.q_proj
    part = torch.diag(torch.tensor([4.0, 3.0] + [0.0] * 30))
    torch.testing.assert_close(product(layer), part, atol=1e-5, rtol=0)
    rest = torch.diag(torch.tensor([0.0, 0.0, 2.0, 1.0] + [0.0] * 28))
    torch.testing.assert_close(layer.base_layer.weight, rest, atol=1e-5, rtol=0)
    # both halves carry the root of the singular values: A A^T = S / scale
    down = layer.lora_A["default"].weight
    torch.testing.assert_close(down @ down.T, torch.diag(torch.tensor([4.0, 3.0])) / 3)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_exact_one_is_what_peft_makes(arch):
    model = begun(base(arch), lora_rank=4, pissa_iter=-1)
    targets = tuned(base(arch), lora_rank=4).peft_config["default"].target_modules
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights="pissa",
        fan_in_fan_out=arch == "gpt2",
    )
    theirs = pissa.lora_layers(get_peft_model(base(arch), config))
    for name, layer in pissa.lora_layers(model).items():
        torch.testing.assert_close(product(layer), product(theirs[name]), atol=2e-4, rtol=0)
        weights = [of.get_base_layer().weight for of in (layer, theirs[name])]
        torch.testing.assert_close(*weights, atol=2e-4, rtol=0)


def test_iterations_bring_the_approximate_one_near_to_the_exact():
    """Singular values 1, 1/2, 1/4, ...; without iterations the random range is far off."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(24, 24)).Q for _ in range(2))
    weight = left @ torch.diag(0.5 ** torch.arange(24.0)) @ right
    errors = {}
    for iterations in (-1, 0, 16):
        down, up = pissa.principal(weight, 3, iterations)
        assert (down.shape, up.shape) == ((3, 24), (24, 3))
        errors[iterations] = torch.linalg.matrix_norm(weight - up @ down, 2).item()
    assert errors[-1] == pytest.approx(0.5**3, rel=1e-4)  # the largest value left
    assert errors[16] == pytest.approx(0.5**3, rel=1e-4)
    assert errors[0] > 0.5**3 * 1.2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("keys", [{}, {"use_rslora": True, "additional_target": "norm"}])
def test_a_converted_adapter_gives_the_trained_logprobs_on_the_original_base(arch, keys, tmp_path):
    if arch == "gpt2" and keys:
        keys = {**keys, "additional_target": "ln_f"}
    keys = {**keys, "lora_rank": 3, "lora_rank_pattern": {r".*\.0\..*": 2}}
    start = logprobs(base(arch))
    model = begun(base(arch), pissa_convert=True, **keys)
    torch.testing.assert_close(logprobs(model), start, atol=5e-5, rtol=0)
    shake(model, scale=0.02)
    end = logprobs(model)
    assert (end - start).abs().max() > 0.01
    path = saved(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6
    assert not (tmp_path / pissa.FILE).exists()
    plain = PeftModel.from_pretrained(base(arch), path)  # as anybody would
    torch.testing.assert_close(logprobs(plain), end, atol=5e-5, rtol=0)
    for is_trainable in (True, False):
        again = tuned(base(arch), adapter_name_or_path=path, is_trainable=is_trainable)
        torch.testing.assert_close(logprobs(again), end, atol=5e-5, rtol=0)


def test_conversion_in_bf16_differs_by_the_rounding_of_the_residual(tmp_path):
    model = begun(base().bfloat16(), pissa_convert=True)
    shake(model, scale=0.02)
    end = logprobs(model.float())
    plain = PeftModel.from_pretrained(base().bfloat16().float(), saved(model, tmp_path))
    assert (logprobs(plain) - end).abs().max() < 0.1


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_an_adapter_with_its_start_goes_on_and_merges(arch, variant, tmp_path):
    model = begun(base(arch), **variant)
    shake(model, scale=0.02)
    path = saved(model, tmp_path)
    assert (tmp_path / pissa.FILE).is_file()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == ("pissa_niter_16", 8)
    again = tuned(base(arch), adapter_name_or_path=path, pissa_init=True)
    assert torch.equal(logprobs(again), logprobs(model))
    merged = tuned(base(arch), adapter_name_or_path=path, is_trainable=False)
    torch.testing.assert_close(logprobs(merged), logprobs(model), atol=5e-5, rtol=0)
    if not variant:  # and may be converted later
        late = tuned(base(arch), adapter_name_or_path=path, pissa_init=True, pissa_convert=True)
        plain = PeftModel.from_pretrained(base(arch), saved(late, tmp_path / "late"))
        torch.testing.assert_close(logprobs(plain), logprobs(model), atol=5e-5, rtol=0)


def test_a_start_that_is_kept_makes_the_same_base_without_decomposing(monkeypatch):
    first = begun()
    kept = copy.deepcopy(pissa.of(first).tensors)
    monkeypatch.setattr(pissa, "principal", None)  # a call would fail
    second = tuned(pissa_init=True)
    pissa.of(second).restore(second, kept)
    for (name, one), (_, two) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    pissa.of(second).begin(second, alone)
    pissa.of(second).restore(second, kept)
    assert torch.equal(logprobs(first), logprobs(second))
    other = {name: tensor + 1 for name, tensor in kept.items()}
    with pytest.raises(CheckpointError, match="started from another decomposition"):
        pissa.of(second).restore(second, other)


def test_ranks_take_what_rank_0_found():
    first, second = tuned(pissa_init=True, seed=1), tuned(pissa_init=True, seed=2)
    pissa.of(first).begin(first, alone)
    pissa.of(second).begin(second, lambda own: pissa.of(first).tensors)
    assert torch.equal(logprobs(first), logprobs(second))


def test_what_is_saved_before_the_first_update_is_an_ordinary_adapter(tmp_path):
    model = tuned(pissa_init=True)
    path = saved(model, tmp_path)
    assert torch.equal(logprobs(PeftModel.from_pretrained(base(), path)), logprobs(base()))


def test_an_adapter_without_its_start_is_refused(tmp_path):
    path = saved(begun(), tmp_path)
    Path(path, pissa.FILE).unlink()
    with pytest.raises(ModelError, match=rf"lacks {pissa.FILE}.*pissa_convert: true"):
        tuned(adapter_name_or_path=path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_rank": 33}, r"rank 33, but .* At most its smaller side"),
        ({"lora_target": "embed_tokens"}, "embed_tokens, an embedding"),
        ({"lora_target": "lm_head"}, "lm_head: its weight is the embedding's too"),
    ],
)
def test_what_cannot_be_decomposed(keys, message):
    with pytest.raises(ArgumentsError, match=message):
        tuned(pissa_init=True, **keys)


def test_pissa_on_an_ordinary_adapter_is_refused(tmp_path):
    path = saved(tuned(), tmp_path)
    with pytest.raises(ArgumentsError, match="is no adapter of PiSSA"):
        tuned(adapter_name_or_path=path, pissa_init=True)
    model = tuned(adapter_name_or_path=path, pissa_init=True, create_new_adapter=True)
    assert pissa.of(model) is not None


def test_the_start_lies_beside_the_adapter_as_it_was(tmp_path):
    model = begun()
    kept = pissa.of(model).tensors
    shake(model)
    saved(model, tmp_path)
    found = load_file(tmp_path / pissa.FILE)
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert found.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


def test_low_bit_weights_cannot_be_decomposed(tmp_path):
    """Why PiSSA of low-bit weights is refused: peft knows no way, and its start takes from W."""
    from bitsandbytes.nn import Linear4bit

    def low_bit():
        model = build_model(hidden_size=64, amplify=2.0)
        layer = model.model.layers[0].self_attn.q_proj
        packed = Linear4bit(layer.in_features, layer.out_features, bias=False)
        packed.load_state_dict(layer.state_dict())
        model.model.layers[0].self_attn.q_proj = packed.to("cpu")
        return model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(TypeError, match="initialize PiSSA under float32, float16, or bfloat16"):
        get_peft_model(low_bit(), config)
    model = begun(build_model(hidden_size=64, amplify=2.0), lora_target="q_proj")
    path = saved(model, tmp_path)
    with pytest.raises(ArgumentsError, match="in low bits, and PiSSA takes a part of them away"):
        tuned(low_bit(), adapter_name_or_path=path)
