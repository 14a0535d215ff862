"""The head in chunks against the model's own logits and torch's autograd."""

import copy
import logging

import pytest
import torch
from layouts import lone_logits, make_rows, target_logprobs
from tiny import build_model
from torch import nn

from llmray.batch import Batch, Segments
from llmray.errors import ModelError
from llmray.model import chunked, head
from llmray.model.attention import why_not_flat
from llmray.model.chunked import Form, Habit, Wanted, linear_outputs, logits_outputs
from llmray.model.head import TokenModel, logit_form

SCALED = {
    "cohere2": Form(0.25),
    "granite": Form(1 / 3),
    "hyperclovax": Form(0.25),
    "minicpm3": Form(0.5),
    "falcon_h1": Form(0.25),
    "gemma2": Form(1.0, 5.0),
    "recurrent_gemma": Form(1.0, 30.0),
    "llama": Form(),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Three targets a chunk at a vocabulary of 320."""
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 3 * 4 * 320)


def token_model(model, **settings):
    is_flat = why_not_flat(model) is None
    return TokenModel(model, flat=is_flat, **settings), is_flat


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", sorted(SCALED))
def test_logprobs_are_those_of_the_models_own_logits(arch, temperature, small_chunks):
    rows, model = make_rows(), build_model(arch, amplify=4.0)
    logits = lone_logits(model, rows.sequences) / temperature
    expected = target_logprobs(logits, rows.flat.target_ids)
    gradient = torch.autograd.grad(expected.sum(), model.get_input_embeddings().weight)[0]

    assert logit_form(model) == SCALED[arch]
    ours, is_flat = token_model(model, temperature=temperature)
    assert not ours.uses_own_head
    output = ours(rows.batch(flat=is_flat), top1=True)

    torch.testing.assert_close(output.logprobs.double(), expected, atol=2e-5, rtol=0)
    assert output.is_top1.tolist() == (logits.argmax(1) == rows.flat.target_ids).tolist()
    found = torch.autograd.grad(output.logprobs.sum(), model.get_input_embeddings().weight)[0]
    assert (found - gradient).abs().max() < 1e-4 * gradient.abs().max()


def test_a_head_that_the_table_gets_wrong_is_found_and_circumvented(monkeypatch, caplog):
    monkeypatch.setattr(head, "CAPS", ())
    rows, model = make_rows(), build_model("gemma2", amplify=4.0)
    expected = target_logprobs(lone_logits(model, rows.sequences), rows.flat.target_ids)
    with caplog.at_level(logging.INFO, "llmray"):
        ours = TokenModel(model, flat=True)
    assert ours.uses_own_head
    assert "Gemma2ForCausalLM computes its logits in a way of its own" in caplog.text
    torch.testing.assert_close(ours(rows.flat).logprobs.double(), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "granite"])
def test_the_table_is_checked_in_any_dtype(arch, dtype, monkeypatch):
    assert not TokenModel(build_model(arch, amplify=4.0).to(dtype), flat=True).uses_own_head
    monkeypatch.setattr(head, "CAPS", ())
    monkeypatch.setattr(head, "DIVISORS", ())
    wrong = TokenModel(build_model(arch, amplify=4.0).to(dtype), flat=True)
    assert wrong.uses_own_head == (arch != "llama")


@pytest.mark.parametrize("wide", ["model.layers.0", "model.layers.1", "lm_head", "model.norm"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_table_is_checked_where_some_layers_train_in_float32(arch, wide, monkeypatch):
    """As in freeze tuning: trained layers are in float32, the rest in bf16, under autocast."""
    model = build_model(arch, amplify=4.0, tie_word_embeddings=False).to(torch.bfloat16)
    model.get_submodule(wide).float()
    assert not TokenModel(model, flat=False).uses_own_head
    monkeypatch.setattr(head, "logit_form", lambda base: Form(slope=1.7))
    assert TokenModel(model, flat=False).uses_own_head


@pytest.mark.parametrize("flat", [True, False])
def test_the_own_forward_gives_what_the_head_gives(flat):
    rows, model = make_rows(), build_model("gemma2", amplify=4.0)
    ours = TokenModel(model, flat=flat, temperature=0.7)
    batch = rows.batch(flat=flat)
    expected = ours(batch, entropy=True, top1=True)
    ours.uses_own_head, ours.form = True, Form().at(0.7)
    found = ours(batch, entropy=True, top1=True)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=4e-6, rtol=0)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=4e-6, rtol=0)
    assert found.is_top1.tolist() == expected.is_top1.tolist()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("form", [Form(), Form(0.3), Form(2.0, 1.5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_equal_those_of_whole_logits(trains, form, has_bias, small_chunks):
    """Outputs weighted by random numbers, so that no two targets count alike."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 320, bias=has_bias).double().requires_grad_(trains)
    hidden = torch.randn(10, 8, dtype=torch.double, requires_grad=True)
    ids = torch.randint(320, (10,))
    weights = torch.randn(2, 10, dtype=torch.double)
    wanted = Wanted(entropy=True, top1=True)

    def results(outputs):
        total = (outputs.logprobs * weights[0] + outputs.entropy * weights[1]).sum()
        inputs = [hidden, *(layer.parameters() if trains else ())]
        return [outputs.logprobs, outputs.entropy, *torch.autograd.grad(total, inputs)]

    expected = results(logits_outputs(form.apply(layer(hidden)), ids, wanted))
    found = results(linear_outputs(hidden, layer, ids, form, wanted))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("weights", [[2.0] * 7, [1.0, 2.0, 0.0, 1.0, 1.0, -1.0, 3.0]])
def test_a_head_that_trains_guesses_equal_weights_and_notices_others(weights, small_chunks):
    torch.manual_seed(0)
    layer = nn.Linear(8, 320).double()
    hidden = torch.randn(7, 8, dtype=torch.double, requires_grad=True)
    ids, habit = torch.randint(320, (7,)), Habit()
    inputs, weights = [hidden, *layer.parameters()], torch.tensor(weights, dtype=torch.double)

    expected = torch.autograd.grad(
        (logits_outputs(layer(hidden), ids, Wanted()).logprobs * weights).sum(), inputs
    )
    for _ in range(2):  # once with the guess, once with what was learnt
        outputs = linear_outputs(hidden, layer, ids, Form(), Wanted(), habit)
        found = torch.autograd.grad((outputs.logprobs * weights).sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
        assert habit.is_uniform == (len(set(weights.tolist())) == 1)


@pytest.mark.parametrize("trains", [False, True])
def test_no_chunk_holds_more_logits_than_allowed(trains, small_chunks, monkeypatch):
    sizes = []
    original = chunked._Chunk.__init__

    def note(self, head, rows, logits, *rest):
        sizes.append(tuple(logits.shape))
        original(self, head, rows, logits, *rest)

    monkeypatch.setattr(chunked._Chunk, "__init__", note)
    layer = nn.Linear(8, 320).requires_grad_(trains)
    hidden = torch.randn(7, 8, requires_grad=True)
    ids = torch.randint(320, (7,))
    linear_outputs(hidden, layer, ids, Form(), Wanted()).logprobs.sum().backward()
    assert set(sizes) == {(3, 320), (1, 320)}
    assert len(sizes) == (6 if trains else 3)  # a head that trains is recomputed


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("uses_own_head", [False, True])
def test_a_batch_without_targets_gives_zero_gradients_to_all(trains, uses_own_head):
    model = build_model()
    model.requires_grad_(trains)
    model.model.norm.weight.requires_grad_(True)
    one, none = torch.tensor([[5]]), torch.tensor([], dtype=torch.long)
    batch = Batch(one, one * 0, none, none, none, 0, 0, Segments((1,), (1,)))
    ours = TokenModel(model, flat=True)
    ours.uses_own_head = uses_own_head
    ours(batch).logprobs.sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() == 0


@pytest.mark.parametrize("where", ["lora", "saved"])
def test_a_head_that_peft_wraps_is_called_as_a_module(where, small_chunks):
    from peft import LoraConfig, get_peft_model

    rows, model = make_rows(), build_model("gemma2", amplify=4.0, tie_word_embeddings=False)
    targets = ["q_proj", "lm_head"] if where == "lora" else ["q_proj"]
    saved = ["lm_head"] if where == "saved" else None
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    tuned = get_peft_model(model, config)
    inputs = [p for p in tuned.parameters() if p.requires_grad]
    expected = target_logprobs(lone_logits(tuned, rows.sequences), rows.flat.target_ids)
    expected_gradients = torch.autograd.grad(expected.sum(), inputs)

    output = TokenModel(tuned, flat=True)(rows.flat)

    torch.testing.assert_close(output.logprobs.double(), expected, atol=1e-5, rtol=0)
    for one, other in zip(
        torch.autograd.grad(output.logprobs.sum(), inputs), expected_gradients, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trains", [False, True])
def test_under_autocast_results_and_gradients_are_those_of_float32_roughly(trains):
    """bf16 keeps 8 bits, so about 1 part in 100 after two layers."""
    rows = make_rows()
    exact = build_model(amplify=2.0)
    exact.lm_head.requires_grad_(trains)
    mixed = copy.deepcopy(exact)
    results = []
    for model, enabled in ((exact, False), (mixed, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = TokenModel(model, flat=True)(rows.flat, entropy=not trains)
        output.logprobs.sum().backward()
        results.append((output.logprobs, model.model.layers[0].mlp.up_proj.weight.grad))
    (logprobs, gradient), (mixed_logprobs, mixed_gradient) = results
    assert mixed_logprobs.dtype == mixed_gradient.dtype == torch.float32
    assert 0 < (mixed_logprobs - logprobs).abs().max() < 0.02
    assert (mixed_gradient - gradient).norm() < 0.03 * gradient.norm()


def test_weights_in_bf16_give_float32_logprobs_and_bf16_gradients():
    rows = make_rows()
    exact = build_model(amplify=2.0)
    low = copy.deepcopy(exact).bfloat16()
    expected = TokenModel(exact, flat=True)(rows.flat).logprobs
    output = TokenModel(low, flat=True)(rows.flat)
    output.logprobs.sum().backward()
    assert output.logprobs.dtype == torch.float32
    assert (output.logprobs - expected).abs().max() < 0.05
    assert low.lm_head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("uses_own_head", [False, True])
def test_the_loss_of_experts_is_the_models_own_times_its_coefficient(uses_own_head):
    model = build_model("mixtral", amplify=3.0, output_router_logits=True, router_aux_loss_coef=0.5)
    [sequence] = make_rows((9,)).sequences
    batch = make_rows((9,)).flat
    expected = 0.5 * model(sequence, use_cache=False).aux_loss
    ours = TokenModel(model, flat=True)
    ours.uses_own_head = uses_own_head
    torch.testing.assert_close(ours(batch).aux_loss, expected)
    model.config.output_router_logits = False
    assert ours(batch).aux_loss is None


def test_a_loss_of_experts_is_refused_where_there_is_none():
    model = build_model("llama", output_router_logits=True)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no auxiliary loss"):
        TokenModel(model, flat=True)(make_rows().flat)
