"""Decoding with a cache against transformers' own generation, its filters, and each row alone."""

import pytest
import torch
from tiny import build_model
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmray.train import generate as generation
from llmray.train.decoding import choose, decode, why_not_decoded
from llmray.train.generate import Response, Sampling, generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [11], [300, 20, 40, 12], [7, 7, 9, 30, 31, 5]]
GREEDY = Sampling(stop_ids=(), pad_id=0, do_sample=False, max_new_tokens=10)
DRAWN = Sampling(stop_ids=(), pad_id=0, temperature=1.5, top_p=0.9, top_k=40, max_new_tokens=8)
CACHED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "bloom", "mixtral")
OTHER = ("mamba", "recurrent_gemma", "falcon_h1", "lfm2")


def changed(sampling, **fields):
    return Sampling(**{**vars(sampling), **fields})


def by_transformers(model, sampling, prompts=PROMPTS, seed=0):
    """Each prompt alone, by transformers."""
    found = []
    for prompt in prompts:
        torch.manual_seed(seed)
        [row] = generation._by_transformers(model, [prompt], sampling, 10, None)
        found.append(generation.ended(row, sampling.stop_ids))
    return found


@pytest.mark.parametrize("arch", CACHED)
def test_the_likeliest_tokens_are_those_of_transformers(arch):
    """Ten tokens: windows of five are long left behind."""
    model = build_model(arch, amplify=4.0)
    assert why_not_decoded(model) is None
    expected = by_transformers(model, GREEDY)
    assert generate(model, PROMPTS, GREEDY) == expected
    assert len({tuple(response.ids) for response in expected}) > 1


@pytest.mark.parametrize("arch", CACHED)
def test_rows_that_have_ended_leave_the_batch(arch):
    model = build_model(arch, amplify=4.0)
    whole = generate(model, PROMPTS, GREEDY)
    # ends differ: each token that occurs first at another place in each response
    stops = (whole[0].ids[1], whole[1].ids[3], whole[2].ids[5])
    stopping = changed(GREEDY, stop_ids=stops)
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = generate(model, PROMPTS, stopping)
    hook.remove()
    assert found == [generation.ended(response.ids, stops) for response in whole]
    assert sizes[0] == 4 > sizes[-1]
    lengths = [len(r.ids) + (r.stop_id is not None) for r in found]
    assert sizes == [sum(length > t for length in lengths) for t in range(len(sizes))]


@pytest.mark.parametrize("arch", OTHER)
def test_other_caches_are_left_to_transformers(arch):
    model = build_model(arch, amplify=2.0)
    assert why_not_decoded(model) is not None
    assert len(generate(model, PROMPTS[:2], GREEDY)) == 2


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_draws_depend_on_the_rows_own_seed_alone(arch):
    model = build_model(arch)
    together = generate(model, PROMPTS, DRAWN, seeds=[11, 12, 13, 14])
    alone = [
        generate(model, [prompt], DRAWN, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, (11, 12, 13, 14), strict=True)
    ]
    backwards = generate(model, PROMPTS[::-1], DRAWN, seeds=[14, 13, 12, 11])
    assert together == alone == backwards[::-1]
    assert generate(model, PROMPTS, DRAWN, seeds=[1, 2, 3, 4]) != together


def test_seeds_leave_torchs_own_random_numbers_alone():
    for arch in ("llama", "mamba"):
        model = build_model(arch)
        before = torch.get_rng_state()
        one = generate(model, PROMPTS, DRAWN, seeds=[1, 2, 3, 4])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert generate(model, PROMPTS, DRAWN, seeds=[1, 2, 3, 4]) == one


def test_a_row_ends_with_its_own_budget():
    model = build_model(amplify=4.0)
    found = decode(model, PROMPTS, [1, 4, 2, 3], GREEDY, [0] * 4).rows
    assert [len(ids) for ids in found] == [1, 4, 2, 3]
    whole = generate(model, PROMPTS, GREEDY)
    assert found == [r.ids[:n] for r, n in zip(whole, (1, 4, 2, 3), strict=True)]


@pytest.mark.parametrize("fields", [{}, {"top_p": 1.0, "top_k": 0}, {"temperature": 0.6}])
def test_the_logprobs_of_draws_are_the_models_before_filters(fields):
    """Against one forward pass over the whole text, with the tokens that end responses."""
    model = build_model(amplify=4.0)
    draw = changed(DRAWN, max_new_tokens=30, stop_ids=tuple(range(3, 40)), **fields)
    found = generate(model, PROMPTS, draw, seeds=[3, 4, 5, 6])
    assert any(response.stop_id is not None for response in found)
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = response.ids + ([] if response.stop_id is None else [response.stop_id])
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / draw.temperature).log_softmax(1)[range(len(ids)), ids]
        assert response.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def test_what_is_not_drawn_from_the_models_shares_has_no_logprobs():
    model = build_model()
    for draw in (GREEDY, changed(DRAWN, repetition_penalty=1.1), changed(DRAWN, use_cache=False)):
        assert generate(model, PROMPTS, draw)[0].logprobs is None


def shares(logits, draw, count=4001):
    """How often each token is chosen as the number goes evenly from 0 to 1."""
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = choose(logits.expand(count, -1), draw, grid)
    return torch.bincount(chosen, minlength=logits.shape[1]) / count


@pytest.mark.parametrize(
    ("top_p", "top_k", "temperature"),
    [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.0, 5, 1.3), (0.6, 10, 1.0), (0.01, 0, 1.0), (0.9, 500, 1.0)],
)
def test_a_token_is_drawn_as_often_as_transformers_filters_say(top_p, top_k, temperature):
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(min(top_k, 50))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(1)[0]
    draw = changed(DRAWN, top_p=top_p, top_k=top_k, temperature=temperature)
    found = shares(logits, draw)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert not found[expected == 0].any()


def test_no_number_leads_behind_the_last_token():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    one = torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    assert choose(logits, changed(DRAWN, top_p=1.0, top_k=0), one).item() == 1
    assert choose(logits, changed(DRAWN, top_p=0.4, top_k=0), one).item() in (0, 1)


def test_repetition_is_punished_as_transformers_does():
    model = build_model(amplify=4.0)
    punished = changed(GREEDY, repetition_penalty=1.5)
    found = generate(model, PROMPTS, punished)
    assert found == by_transformers(model, punished) != generate(model, PROMPTS, GREEDY)
    scores = torch.randn(1, 20)
    assert not torch.equal(
        RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1]]), scores), scores
    )


def test_a_stop_token_is_not_part_of_the_response():
    model = build_model(amplify=4.0)
    [first, *_] = generate(model, PROMPTS, GREEDY)
    stop = first.ids[0]
    [found, *_] = generate(model, PROMPTS, changed(GREEDY, stop_ids=(stop,)))
    assert found == Response([], stop)
