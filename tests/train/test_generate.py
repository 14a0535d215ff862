"""Generation against a loop that computes every token anew, one prompt at a time."""

import pytest
import torch
from tiny import build_model, make_tokenizer

from llmray.arguments.loading import load
from llmray.model import tuning
from llmray.model.attention import use_flat
from llmray.train.generate import Response, Sampling, ended, generate, stop_ids

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [300, 20, 40, 12]]
GREEDY = Sampling(stop_ids=(1, 2), pad_id=0, do_sample=False, max_new_tokens=6)


def by_hand(model, prompt, num_tokens, stops=(1, 2)):
    """The likeliest tokens, without cache, padding or transformers' generate."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            token = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token in stops:
                return Response(ids[len(prompt) :], token)
            ids.append(token)
    return Response(ids[len(prompt) :], None)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("flat", [False, True])
def test_padded_prompts_answer_as_each_alone(arch, flat):
    model = build_model(arch, amplify=4.0)
    expected = [by_hand(model, prompt, 6) for prompt in PROMPTS]
    if flat and arch != "gpt2":
        use_flat(model)
    assert generate(model, PROMPTS, GREEDY) == expected
    assert len({tuple(response.ids) for response in expected}) > 1


def test_without_a_cache_the_responses_are_the_same_and_every_token_is_computed():
    model = build_model(amplify=4.0)
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cached = generate(model, PROMPTS, GREEDY)
    assert widths[1:] == [1] * (len(widths) - 1)
    widths.clear()
    uncached = Sampling(**{**vars(GREEDY), "use_cache": False})
    assert generate(model, PROMPTS, uncached) == cached
    assert widths == list(range(6, 6 + len(widths)))


def test_a_response_ends_at_a_stop_token():
    model = build_model(amplify=4.0)
    whole = generate(model, PROMPTS[:1], GREEDY)[0].ids
    stop = Sampling(**{**vars(GREEDY), "stop_ids": (whole[2],)})
    [found] = generate(model, PROMPTS[:1], stop)
    first = whole.index(whole[2])
    assert found == Response(whole[:first], whole[2])
    assert ended([5, 6, 2, 9], (2,)) == Response([5, 6], 2)
    assert ended([5, 6], (2,)) == Response([5, 6], None)


def test_max_length_counts_each_prompt_by_itself():
    """Room 7: prompts of 6, 1 and 4 tokens get 1, 6 and 3, whatever they are padded to."""
    model = build_model(amplify=4.0)
    limited = Sampling(stop_ids=(), pad_id=0, do_sample=False, max_length=7)
    found = generate(model, PROMPTS, limited)
    assert [len(response.ids) for response in found] == [1, 6, 3]
    assert found == [by_hand(model, p, 7 - len(p), stops=()) for p in PROMPTS]


def test_a_prompt_without_room_gets_an_empty_response():
    model = build_model(amplify=4.0, max_position_embeddings=6)
    found = generate(model, PROMPTS, GREEDY)
    assert [bool(response.ids) for response in found] == [False, True, True]
    assert len(found[2].ids) <= 2
    assert generate(model, [PROMPTS[0]], GREEDY) == [Response([], None)]


def test_draws_follow_torchs_seed_and_the_temperature():
    model = build_model()
    drawn = Sampling(stop_ids=(), pad_id=0, temperature=2.0, max_new_tokens=6)

    def answers(seed, sampling=drawn):
        torch.manual_seed(seed)
        return generate(model, PROMPTS, sampling)

    assert answers(1) == answers(1) != answers(2)
    cold = Sampling(**{**vars(drawn), "temperature": 0.0})
    assert answers(1, cold) == answers(2, cold) == [by_hand(model, p, 6, ()) for p in PROMPTS]


def test_an_adapter_generates_as_it_stands():
    keys = {"model_name_or_path": "m", "template": "chatml"}
    model = build_model(amplify=4.0)
    before = generate(model, PROMPTS, GREEDY)
    tuned = tuning.apply(model, load(keys, environ={}), is_trainable=True, upcast=False)
    assert generate(tuned, PROMPTS, GREEDY) == before  # it starts at zero
    torch.manual_seed(0)
    for parameter in tuning.trainable(tuned).values():
        torch.nn.init.normal_(parameter, std=0.5)
    expected = [by_hand(tuned.eval(), prompt, 6) for prompt in PROMPTS]
    assert generate(tuned, PROMPTS, GREEDY) == expected != before


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"temperature": 0}, "do_sample", False),
        ({"do_sample": False}, "do_sample", False),
        ({"top_p": 0.3}, "top_p", 0.3),
        ({"top_k": 7}, "top_k", 7),
        ({"num_beams": 4}, "num_beams", 4),
        ({"num_beams": 4, "length_penalty": 2.0}, "length_penalty", 2.0),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"use_kv_cache": False}, "use_cache", False),
    ],
)
def test_each_key_reaches_transformers(keys, field, value, tmp_path):
    tokenizer, model = make_tokenizer(tmp_path), build_model()
    base = {"model_name_or_path": "m", "template": "chatml"}
    default = Sampling.of(load(base, environ={}), model, tokenizer)
    found = Sampling.of(load(base | keys, environ={}), model, tokenizer)
    assert getattr(found.config(5), field) == value != getattr(default.config(5), field)
    assert found.config(5).max_new_tokens == 5
    assert found.config(5).eos_token_id == [1, 2]


@pytest.mark.parametrize(
    ("keys", "beams", "budget"),
    [
        ({}, 1, 1024),
        ({"max_new_tokens": 7, "num_beams": 2}, 2, 7),
        ({"max_new_tokens": 0, "max_length": 30}, 1, 20),
        ({"generation_max_length": 50, "max_new_tokens": 7}, 1, 40),
        ({"num_beams": 2, "generation_num_beams": 3}, 3, 1024),
        ({"generation_num_beams": 3, "eval_num_beams": 4}, 4, 1024),
    ],
)
def test_evaluation_has_beams_and_a_length_of_its_own(keys, beams, budget, tmp_path):
    tokenizer, model = make_tokenizer(tmp_path), build_model()
    base = {"model_name_or_path": "m", "template": "chatml"}
    sampling = Sampling.for_evaluation(load(base | keys, environ={}), model, tokenizer)
    assert (sampling.num_beams, sampling.budget(10, None)) == (beams, budget)
    assert sampling.budget(10, 12) == 2
    assert stop_ids(model, tokenizer, "chatml") == (1, 2)
