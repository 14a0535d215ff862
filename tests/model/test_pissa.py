"""PiSSA: the decomposition, conversion to the original weights, adapters that go on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from tiny import build_model
from transformers.pytorch_utils import Conv1D
from tuned import logprobs, saved, shake, tuned

from llmray.arguments.model import ModelArguments
from llmray.errors import ArgumentsError, CheckpointError, ModelError
from llmray.model import pissa
from llmray.model.layers import linear_modules
from llmray.model.load import load_model

CPU = torch.device("cpu")

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


# ---- beside low-bit weights -----------------------------------------------------------------

BITS = [4, 8]
LOW_BIT_ARCHITECTURES = ["llama", "gemma3_text", "qwen3_moe", "gpt2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models whose matrices have a few large singular values, as trained ones do."""
    root = tmp_path_factory.mktemp("ordinary")
    for arch in LOW_BIT_ARCHITECTURES:
        sizes = {"n_embd": 64} if arch == "gpt2" else {"hidden_size": 64, "head_dim": 16}
        model = build_model(arch, amplify=2.0, **sizes)
        generator = torch.Generator().manual_seed(0)
        for module in linear_modules(model).values():
            one, two = (torch.randn(n, 4, generator=generator) for n in module.weight.shape)
            module.weight.data.add_(0.02 * one @ two.T)
        model.save_pretrained(root / arch)
    return root


def read(folder, bits=None, **keys):
    arguments = ModelArguments(quantization_bit=bits, **keys)
    return load_model(
        folder, arguments, dtype=torch.float32, device=CPU, gradient_checkpointing=False
    )


def dense(layer):
    """What a low-bit layer multiplies by, beside its adapter."""
    module = layer.get_base_layer()
    return dequantize_module_weight(module).detach().float()


def low_bit_start(folder, bits=4, **keys):
    return begun(read(folder, bits), quantization_bit=bits, **keys)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("arch", LOW_BIT_ARCHITECTURES)
def test_low_bits_hold_what_the_decomposition_left(arch, bits, folders):
    """Each residual is W less the adapter, rounded as bitsandbytes rounds it alone; and nearer to
    it than the rounded W is to W: section 4 of the paper (QPiSSA)."""
    ordinary = read(folders / arch)
    plain = pissa.lora_layers(tuned(read(folders / arch, bits), quantization_bit=bits))
    layers = pissa.lora_layers(low_bit_start(folders / arch, bits, lora_rank=4))
    assert layers.keys() == plain.keys()
    for name, layer in layers.items():
        assert not layer.get_base_layer().weight.is_floating_point()
        source = ordinary.get_submodule(name.removeprefix("base_model.model."))
        weight = source.weight.detach()
        weight = weight.T if isinstance(source, Conv1D) else weight
        rest = weight - product(layer).detach()
        if bits == 4:
            packed, state = quantize_4bit(
                rest.contiguous(), quant_type="nf4", compress_statistics=True
            )
            expected = dequantize_4bit(packed, state)
        else:
            scale = rest.half().float().abs().amax(1, keepdim=True) / 127
            expected = (rest.half().float() / scale).round() * scale
        # where rest lies between two values, one or two of a matrix may round the other way
        assert (dense(layer) - expected).norm() < 0.02 * expected.norm()
        of_plain = torch.linalg.matrix_norm(weight - dense(plain[name]), "nuc")
        own = torch.linalg.matrix_norm(rest - dense(layer), "nuc")
        assert own < 0.9 * of_plain, name


@pytest.mark.parametrize("bits", BITS)
def test_the_start_is_nearer_to_the_ordinary_model_than_low_bits_are(bits, folders):
    exact = logprobs(read(folders / "llama"))
    plain = (logprobs(read(folders / "llama", bits)) - exact).abs().mean()
    own = (logprobs(low_bit_start(folders / "llama", bits)) - exact).abs().mean()
    assert 0 < own < 0.8 * plain


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("arch", LOW_BIT_ARCHITECTURES)
def test_a_converted_adapter_of_low_bits_goes_onto_the_ordinary_model(
    arch, bits, folders, tmp_path
):
    """Its error is the rounding of the residual alone: exact where that is put back."""
    start = logprobs(read(folders / arch))
    model = low_bit_start(folders / arch, bits, pissa_convert=True, lora_rank=4)
    shake(model, scale=0.02)
    end = logprobs(model)
    path = saved(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    found = logprobs(PeftModel.from_pretrained(read(folders / arch), path))
    assert (found - start).abs().max() > 0.01
    ordinary = read(folders / arch)
    rounding = {}
    for name, layer in pissa.lora_layers(model).items():
        source = ordinary.get_submodule(name.removeprefix("base_model.model."))
        kept = [pissa.of(model).tensors[f"{name}.lora_{side}.weight"] for side in "BA"]
        left = dense(layer) + layer.scaling["default"] * kept[0] @ kept[1]
        left = left.T if isinstance(source, Conv1D) else left
        rounding[name] = (left - source.weight).detach().norm() / source.weight.norm()
        source.weight.data.copy_(left)
    assert 0 < max(rounding.values()) < (0.1 if bits == 4 else 0.01)
    # products of 8 bits round their inputs in evaluation
    exact = logprobs(PeftModel.from_pretrained(ordinary, path))
    torch.testing.assert_close(exact, end, atol=1e-4 if bits == 4 else 0.1, rtol=0)
    assert (found - end).abs().mean() < (0.2 if bits == 4 else 0.05)


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_of_low_bits_goes_on_answers_and_merges(bits, folders, tmp_path):
    variant = {"use_dora": True} if bits == 4 else {}
    model = low_bit_start(folders / "llama", bits, **variant)
    shake(model, scale=0.02)
    path = saved(model, tmp_path)
    assert (tmp_path / pissa.FILE).is_file()
    end = logprobs(model)
    keys = {"adapter_name_or_path": path, "quantization_bit": bits}
    again = tuned(read(folders / "llama", bits), pissa_init=True, **keys)
    assert torch.equal(logprobs(again), end)
    beside = tuned(read(folders / "llama", bits), is_trainable=False, **keys)
    assert torch.equal(logprobs(beside), end)
    merged = tuned(read(folders / "llama"), is_trainable=False, adapter_name_or_path=path)
    assert 0 < (logprobs(merged) - end).abs().mean() < 0.2
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("bits", BITS)
def test_an_evaluation_before_the_start_leaves_no_scales_behind(bits, folders):
    model = tuned(read(folders / "llama", bits), pissa_init=True, quantization_bit=bits)
    before = logprobs(model)
    assert torch.equal(before, logprobs(read(folders / "llama", bits)))
    pissa.of(model).begin(model, alone)
    ordinary = read(folders / "llama")
    for name, layer in pissa.lora_layers(model).items() if bits == 8 else ():
        source = ordinary.get_submodule(name.removeprefix("base_model.model."))
        largest = (source.weight - product(layer)).abs().amax(1).detach()
        torch.testing.assert_close(layer.get_base_layer().state.SCB, largest, atol=0, rtol=2e-3)
    assert torch.equal(logprobs(model), logprobs(low_bit_start(folders / "llama", bits)))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_rest_is_rounded_as_the_whole_was(kind, nested, folders):
    keys = {"quantization_type": kind, "double_quantization": nested}
    model = tuned(read(folders / "llama", 4, **keys), pissa_init=True, quantization_bit=4, **keys)
    pissa.of(model).begin(model, alone)
    for layer in pissa.lora_layers(model).values():
        state = layer.get_base_layer().weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == (kind, nested, 64)
        assert layer.get_base_layer().quant_state is state


def test_files_in_low_bits_have_nothing_to_decompose(folders, tmp_path):
    """Without the ordinary weights what was rounded away is gone."""
    read(folders / "llama", 4).save_pretrained(tmp_path / "low")
    for keys in ({}, {"quantization_bit": 4}):
        low = read(tmp_path / "low", keys.get("quantization_bit"))
        with pytest.raises(ArgumentsError, match=r"files have .* in low bits.* Ordinary weights"):
            tuned(low, pissa_init=True, **keys)
    path = saved(low_bit_start(folders / "llama"), tmp_path / "adapter")
    with pytest.raises(ArgumentsError, match=r"files have .* in low bits"):
        tuned(read(tmp_path / "low"), adapter_name_or_path=path)


def test_rank_of_low_bits_is_that_of_the_matrix(folders):
    with pytest.raises(ArgumentsError, match=r"rank 65, but .* is a matrix of \(\d+, \d+\)"):
        tuned(read(folders / "llama", 4), pissa_init=True, quantization_bit=4, lora_rank=65)
