"""Flat rows against one sequence at a time, on amplified random models."""

import pytest
import torch
from layouts import lone_logits, make_rows, target_logprobs
from tiny import ARCHITECTURES, build_model

from llmray.batch import Batch, Segments
from llmray.model import attention
from llmray.model.attention import FLAT, VERIFIED, native, use_flat, why_not_flat
from llmray.model.head import TokenModel

REFUSED = {
    "falcon_h1": "layers of kind hybrid",
    "lfm2": "layers of kind conv",
    "llama4_text": "layers of kind chunked_attention",
    "bloom": "BloomForCausalLM does not use transformers' attention interface",
    "gptj": "GPTJForCausalLM does not use transformers' attention interface",
    "mamba": "MambaForCausalLM does not use transformers' attention interface",
    "recurrent_gemma": "layers of kind linear_attention",
}
PROBED = set(ARCHITECTURES) - set(REFUSED) - VERIFIED


def relative(found, expected):
    """The largest deviation, over the largest expected value of all tensors."""
    pairs = list(zip(found, expected, strict=True))
    peak = max(e.abs().max() for _, e in pairs if e is not None)
    return max((f - e).abs().max() for f, e in pairs if e is not None) / peak


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(REFUSED)))
def test_a_flat_row_equals_one_sequence_at_a_time(arch):
    rows = make_rows()
    model = build_model(arch, amplify=4.0)
    logits = lone_logits(model, rows.sequences)
    expected = target_logprobs(logits, rows.flat.target_ids)
    weights = torch.linspace(-1, 2, len(expected))
    expected_gradients = gradients((expected * weights).sum(), model)

    assert why_not_flat(model) is None
    output = TokenModel(model, flat=True)(rows.flat)

    torch.testing.assert_close(output.logprobs.double(), expected, atol=4e-6, rtol=0)
    assert relative(gradients((output.logprobs * weights).sum(), model), expected_gradients) < 1e-5


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(REFUSED)))
def test_sequences_that_see_each_other_would_show(arch):
    rows = make_rows()
    model = build_model(arch, amplify=4.0)
    expected = target_logprobs(lone_logits(model, rows.sequences), rows.flat.target_ids)
    total = (rows.flat.num_tokens,)
    mixed = Batch(**{**vars(rows.flat), "segments": Segments(total, total)})

    output = TokenModel(model, flat=True)(mixed)

    assert (output.logprobs - expected).abs().max() > 0.05


def test_every_verified_architecture_is_tested():
    assert set(ARCHITECTURES) >= VERIFIED
    assert PROBED  # so that the trial of unknown types is tested too


@pytest.mark.parametrize("arch", sorted(REFUSED))
def test_refused_architectures_equal_lone_sequences_when_padded(arch):
    rows = make_rows()
    model = build_model(arch, amplify=3.0)
    expected = target_logprobs(lone_logits(model, rows.sequences), rows.padded.target_ids)
    expected_gradients = gradients(expected.sum(), model)

    assert why_not_flat(model) == REFUSED[arch]
    output = TokenModel(model, flat=False)(rows.padded)

    torch.testing.assert_close(output.logprobs.double(), expected, atol=2e-5, rtol=0)
    assert relative(gradients(output.logprobs.sum(), model), expected_gradients) < 1e-4


def test_the_trial_finds_layers_that_leak(monkeypatch):
    monkeypatch.setattr(attention, "_by_configuration", lambda model: None)
    model = build_model("lfm2", amplify=3.0)
    assert "lfm2 differs on a flat row by" in why_not_flat(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_trial_does_not_trust_a_model_in_which_a_mix_up_cannot_show(monkeypatch):
    monkeypatch.setattr(attention, "VERIFIED", frozenset())
    model = build_model("llama", amplify=3.0)
    assert why_not_flat(model) is None
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert "sequences mixed up" in why_not_flat(model)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_answers_that_share_a_prompt_equal_two_sequences(arch):
    """Row [prompt, chosen, rejected]: the rejected answer's keys are prompt and itself."""
    prompt, chosen, rejected = torch.randint(3, 300, (1, 20)).split((9, 4, 7), 1)
    p, c, r = 9, 4, 7
    model = build_model(arch, amplify=4.0)
    alone = [
        model(torch.cat([prompt, answer], 1), use_cache=False).logits[0]
        for answer in (chosen, rejected)
    ]
    expected = torch.cat([alone[0], alone[1][p:]])

    use_flat(model)
    positions = torch.cat([torch.arange(p + c), torch.arange(p, p + r)])[None]
    keys = torch.cat([torch.arange(p + c), torch.arange(p), torch.arange(p + c, p + c + r)])
    logits = model(
        torch.cat([prompt, chosen, rejected], 1),
        position_ids=positions,
        segments=Segments((p + c, r), (p + c, p + r), keys),
        use_cache=False,
    ).logits[0]

    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(40, 40), (23, 40), (7, 40)])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_blocks_of_a_window_give_what_one_mask_gives(num_queries, num_keys, window, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    torch.manual_seed(0)
    q = torch.randn(1, 4, num_queries, 8, requires_grad=True)
    k, v = (torch.randn(1, 2, num_keys, 8, requires_grad=True) for _ in "kv")
    mask = attention._visible(num_queries, num_keys, window, q.device)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    found = attention._windowed(q, k, v, window, None, 0.0)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    pairs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_all_layers_save_one_mask():
    """Its memory must not grow with layers, nor with the square of a row's length."""
    masks = [attention._hidden(5, 9, 3, torch.device("cpu"), torch.float32) for _ in "ab"]
    assert masks[0] is masks[1]
    saved = []
    q = torch.randn(1, 2, 2000, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        attention._windowed(q, q, q, 16, None, 0.0)
    largest = max(tensor.numel() for tensor in saved)
    assert largest <= max(q.numel(), 256 * (256 + 16))


def test_a_padded_call_of_a_flat_model_is_refused():
    rows, model = make_rows(), build_model()
    use_flat(model)
    with pytest.raises(ValueError, match="native"):
        model(rows.padded.input_ids, attention_mask=rows.padded.attention_mask)
    with pytest.raises(ValueError, match="a flat row is required"):
        TokenModel(model, flat=True)(rows.padded)


@pytest.mark.parametrize(("arch", "own"), [("llama", "sdpa"), ("gpt_oss", "eager")])
def test_generation_runs_in_the_models_own_implementation(arch, own):
    model = build_model(arch, amplify=4.0)
    prompt = torch.arange(5, 17)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    expected = model.generate(prompt, attention_mask=mask, **settings)

    use_flat(model)
    with native(model):
        assert model.config._attn_implementation == own
        found = model.generate(prompt, attention_mask=mask, **settings)

    assert found.tolist() == expected.tolist()
    assert model.config._attn_implementation == FLAT


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(arch, is_reentrant):
    rows = make_rows()
    model = build_model(arch, amplify=3.0).train()
    token_model = TokenModel(model, flat=True)
    expected = gradients(token_model(rows.flat).logprobs.sum(), model)

    model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
    token_model(rows.flat).logprobs.sum().backward()

    assert relative([p.grad for p in model.parameters()], expected) < 2e-6
