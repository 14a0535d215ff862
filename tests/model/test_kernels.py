"""The choice of kernels, and flat rows through each of them beside torch's own."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from layouts import make_rows
from tiny import build_model

from llmray.arguments.model import ModelArguments
from llmray.batch import Segments
from llmray.errors import ArgumentsError, ModelError
from llmray.model import attention, kernels
from llmray.model.attention import FLAT, Settings, is_flat
from llmray.model.head import TokenModel
from llmray.model.load import load_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


def loaded(directory, **keys):
    return load_model(
        directory,
        ModelArguments(**keys),
        dtype=torch.float32,
        device=CPU,
        gradient_checkpointing=False,
    )


@pytest.mark.parametrize(
    ("flash_attn", "own", "flat"),
    [
        ("auto", "sdpa", FLAT),
        ("sdpa", "sdpa", FLAT),
        ("disabled", "eager", None),
        ("flex", "flex_attention", f"{FLAT}_x"),
    ],
)
def test_the_choice_is_made_and_said(flash_attn, own, flat, tiny_llama_dir, caplog):
    with caplog.at_level("INFO", "llmray"):
        model = loaded(tiny_llama_dir, flash_attn=flash_attn)
    assert model.config._attn_implementation == own
    assert f"flash_attn: {flash_attn}" in caplog.text
    if flat is None:
        assert attention.why_not_flat(model) is not None
        return
    TokenModel(model, flat=True)
    assert model.config._attn_implementation == flat
    assert is_flat(model)


@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_flash_attention_needs_a_gpu_and_its_package(name, monkeypatch):
    with pytest.raises(ArgumentsError, match=f"flash_attn={name}, but this process"):
        kernels.prepare(name, CPU, BF16)
    monkeypatch.setattr(kernels, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=f"flash_attn={name} needs the package flash_attn"):
        kernels.prepare(name, GPU, BF16)
    monkeypatch.setattr(kernels, "find_spec", lambda package: object())
    assert kernels.prepare(name, GPU, BF16).kernel is kernels.KERNELS[name]


def test_auto_takes_the_best_that_is_there(monkeypatch):
    found: set[str] = set()
    monkeypatch.setattr(kernels, "find_spec", lambda package: package if package in found else None)
    choice = kernels.prepare("auto", GPU, BF16)
    assert choice.kernel.flat == FLAT
    assert "no package" in choice.reason
    found |= {"flash_attn"}
    assert kernels.prepare("auto", GPU, BF16).kernel == kernels.Kernel(None, f"{FLAT}_2")
    found |= {"flash_attn_interface"}
    assert kernels.prepare("auto", GPU, BF16).kernel == kernels.Kernel(None, f"{FLAT}_3")
    assert kernels.prepare("auto", GPU, torch.float32).kernel.flat == FLAT
    assert kernels.prepare("auto", CPU, BF16).kernel.flat == FLAT


def test_flex_does_not_train_on_a_cpu():
    with pytest.raises(ArgumentsError, match="no gradients of it on a CPU"):
        kernels.require_gradients("flex", CPU)
    kernels.require_gradients("flex", GPU)
    kernels.require_gradients("auto", CPU)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text", "gemma2", "qwen3_moe"])
def test_flex_gives_the_logprobs_of_torchs_own(arch):
    rows = make_rows()
    model = build_model(arch, amplify=3.0)
    with torch.no_grad():
        expected = TokenModel(model, flat=True)(rows.flat).logprobs
        model.set_attn_implementation(f"{FLAT}_x")
        found = TokenModel(model, flat=True)(rows.flat).logprobs
    assert model.config._attn_implementation == f"{FLAT}_x"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **settings):
    """What flash_attn_varlen_func computes, written plainly; causal from the last key on."""
    assert settings.pop("causal") is True
    assert {q.dtype, k.dtype, v.dtype} == {BF16}
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    scale, (left, _), cap = (settings[n] for n in ("softmax_scale", "window_size", "softcap"))
    assert settings.get("dropout_p", 0.0) == 0.0
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        one = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].float().transpose(0, 1)
        keys, values = (
            x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].float().transpose(0, 1) for x in (k, v)
        )
        shared = len(one) // len(keys)
        keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
        scores = one @ keys.mT * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        n, m = scores.shape[1:]
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        hidden = (distance < 0) | ((distance > left) & (left >= 0))
        parts.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts).to(BF16)


@pytest.mark.parametrize("attend", [kernels.by_flash_2, kernels.by_flash_3])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0)])
@pytest.mark.parametrize("lengths", [((9, 5), (9, 5)), ((13, 7), (13, 16))])
def test_flash_attention_is_asked_for_what_the_layer_says(
    attend, window, softcap, lengths, monkeypatch
):
    for name in ("flash_attn", "flash_attn_interface"):
        module = ModuleType(name)
        module.flash_attn_varlen_func = varlen
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    segments, settings = Segments(*lengths), Settings(0.5, 0.0, window, softcap, None)
    query = torch.randn(1, 4, sum(lengths[0]), 8, dtype=BF16)
    key, value = torch.randn(2, 1, 2, sum(lengths[1]), 8, dtype=BF16)

    expected = attention.by_segment(query.float(), key.float(), value.float(), segments, settings)
    found = attend(query, key, value, segments, settings)

    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    with pytest.raises(ModelError, match="FlashAttention has 16 bits alone"):
        attend(query.float(), key.float(), value.float(), segments, settings)
    with pytest.raises(ModelError, match="no attention sinks"):
        attend(query, key, value, segments, Settings(0.5, 0.0, None, None, torch.zeros(4)))


def test_flex_sees_the_last_key_from_the_last_query():
    """Answers that share a prompt have more keys than queries."""
    torch.manual_seed(0)
    segments, settings = Segments((13, 7), (13, 16)), Settings(None, 0.0, 6, None, None)
    query = torch.randn(1, 4, 20, 16)
    key, value = torch.randn(2, 1, 2, 29, 16)
    with torch.no_grad():
        found = kernels.by_flex(query, key, value, segments, settings)
        expected = attention.by_segment(query, key, value, segments, settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.shape == F.pad(expected, (0, 0)).shape


def test_liger_needs_a_gpu(tiny_llama_dir):
    with pytest.raises(ArgumentsError, match="Liger's kernels are Triton's and need a GPU"):
        loaded(tiny_llama_dir, enable_liger_kernel=True)


class OnGpu:
    """As much of a model as the choice of Liger's kernels looks at."""

    device = GPU

    def __init__(self, model_type="llama"):
        self.config = type("Config", (), {"model_type": model_type})


@pytest.fixture
def liger(monkeypatch):
    calls = []

    def apply(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, model=None
    ):
        calls.append((rope, cross_entropy, fused_linear_cross_entropy, rms_norm))

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    patch = ModuleType("monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    return calls


def test_liger_replaces_all_but_the_loss(liger):
    kernels.use_liger(OnGpu(), None)
    kernels.use_liger(OnGpu(), {"rope": False})
    assert liger == [(True, False, False, True), (False, False, False, True)]


def test_what_liger_has_not_is_refused(liger, monkeypatch):
    with pytest.raises(ModelError, match="no kernels for gpt2"):
        kernels.use_liger(OnGpu("gpt2"), None)
    for name in ("swiglu", "fused_linear_cross_entropy"):
        with pytest.raises(ArgumentsError, match=f"there is no {name} to replace"):
            kernels.use_liger(OnGpu(), {name: True})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ModelError, match=r"llmray\[liger\]"):
        kernels.use_liger(OnGpu(), None)
