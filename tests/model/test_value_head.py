"""The value head: where it reads, its arithmetic, its file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_model
from torch import nn

from llmray.arguments.loading import load as load_run
from llmray.data.collate import apart, collate
from llmray.data.shards import Sample
from llmray.errors import ModelError
from llmray.model import value_head
from llmray.model.attention import native
from llmray.model.head import TokenModel
from llmray.model.value_head import BIAS, FILE, WEIGHT, ValueHead

LENGTHS = (7, 1, 12, 3)


def samples(lengths=LENGTHS):
    draw = np.random.default_rng(0)
    rows = []
    for length in lengths:
        mask = np.ones(length, bool)
        mask[0] = False
        rows.append(Sample(draw.integers(3, 300, length).astype(np.int32), mask))
    return rows


def last_states(model):
    """(num_samples, D) states of each sample's last token, each run alone in the model's way."""
    with native(model):
        return torch.cat(
            [
                model.base_model(
                    torch.tensor(sample.input_ids)[None].long(), use_cache=False
                ).last_hidden_state[:, -1]
                for sample in samples()
            ]
        )


def scoring(model, *, flat, **keys):
    head = value_head.create(model, seed=3)
    return TokenModel(model, flat=flat, value_head=head, only_scores=True, **keys), head


FLAT_ROWS = ["llama", "qwen2", "gemma2", "mixtral", "gpt2"]


@pytest.mark.parametrize(
    ("arch", "flat"),
    [*((arch, True) for arch in FLAT_ROWS), ("llama", False), ("falcon_h1", False)],
)
def test_scores_are_read_at_the_last_token_of_each_sample(arch, flat):
    model = build_model(arch, amplify=3.0)
    ours, head = scoring(model, flat=flat)
    with torch.no_grad():
        expected = last_states(model) @ head.summary.weight[0] + head.summary.bias
        output = ours(collate(samples(), flat=flat, pad_id=0))
    torch.testing.assert_close(output.scores, expected, atol=2e-5, rtol=1e-5)
    assert output.scores.std() > 0.1
    assert output.logprobs.shape == (0,)
    assert output.values is None


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_answers_that_share_a_prompt_are_scored_as_if_each_had_its_own(arch, flat):
    """One of the answers is a single token, which stands right behind the other answer."""
    draw = np.random.default_rng(1)
    pairs = []
    for prompt, chosen, rejected in ((9, 4, 1), (5, 1, 6)):
        ids = draw.integers(3, 300, prompt + chosen + rejected).astype(np.int32)
        starts = np.array([prompt, prompt + chosen], np.int32)
        pairs.append(Sample(ids, np.arange(len(ids)) >= prompt, starts=starts))
    ours, _ = scoring(build_model(arch, amplify=3.0), flat=flat)
    alone = [part for pair in pairs for part in apart(pair)]
    with torch.no_grad():
        found = ours(collate(pairs, flat=flat, pad_id=0)).scores
        lone = [ours(collate([part], flat=flat, pad_id=0)).scores for part in alone]
    torch.testing.assert_close(found, torch.cat(lone), atol=1e-5, rtol=1e-5)


def test_nothing_is_predicted_where_only_scores_are_wanted():
    model = build_model()
    model.lm_head.forward = None  # a call fails
    ours, _ = scoring(model, flat=True)
    assert ours(collate(samples(), flat=True, pad_id=0)).scores.shape == (4,)


@pytest.mark.parametrize("flat", [True, False])
def test_values_stand_beside_logprobs_at_the_targets(flat):
    model = build_model("llama", amplify=3.0)
    head = value_head.create(model, seed=3)
    batch = collate(samples(), flat=flat, pad_id=0)
    with torch.no_grad():
        output = TokenModel(model, flat=flat, value_head=head)(batch)
        plain = TokenModel(model, flat=flat)(batch)
        model.set_attn_implementation("sdpa")
        lone = [
            head(model.base_model(torch.tensor(s.input_ids)[None].long()).last_hidden_state[0, :-1])
            for s in samples()
        ]
    assert torch.equal(output.logprobs, plain.logprobs)
    assert plain.values is None
    torch.testing.assert_close(output.values, torch.cat(lone), atol=2e-5, rtol=1e-5)


def test_the_head_is_float32_whatever_the_model_is():
    model = build_model("llama", amplify=2.0).bfloat16()
    ours, head = scoring(model, flat=True)
    assert head.summary.weight.dtype == torch.float32
    batch = collate(samples(), flat=True, pad_id=0)
    hidden = []
    model.base_model.register_forward_hook(lambda m, a, out: hidden.append(out.last_hidden_state))
    with torch.autocast("cpu", torch.bfloat16):
        scores = ours(batch).scores
    states = hidden[0][0, batch.ends].float()
    assert scores.dtype == torch.float32
    assert torch.equal(scores, (states @ head.summary.weight.T + head.summary.bias)[:, 0])
    scores.sum().backward()
    assert head.summary.weight.grad.dtype == torch.float32


def test_a_rank_without_rows_gives_zero_gradients_to_all():
    model = build_model()
    ours, _ = scoring(model, flat=True)
    ours(collate([], flat=True, pad_id=0)).scores.sum().backward()
    inner = [p for n, p in ours.named_parameters() if "lm_head" not in n]
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in inner)


def test_a_new_head_follows_from_the_seed_alone():
    """Deviation 1 / sqrt(D + 1): over states of norm sqrt(D) a reward of about 1."""
    model = build_model(hidden_size=1024, intermediate_size=16)
    torch.manual_seed(1)
    one = value_head.create(model, 5)
    torch.manual_seed(2)
    assert torch.equal(one.summary.weight, value_head.create(model, 5).summary.weight)
    assert not torch.equal(one.summary.weight, value_head.create(model, 6).summary.weight)
    assert not any(p.any() for p in value_head.create(model, None).parameters())
    assert one.summary.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert one.summary.bias.item() == 0


def test_the_file_has_the_known_names_and_comes_back(tmp_path):
    model = build_model()
    head = value_head.create(model, 0)
    nn.init.constant_(head.summary.bias, 0.25)
    value_head.write(head, tmp_path)
    tensors = load_file(tmp_path / "value_head.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "v_head.summary.weight": (1, 32),
        "v_head.summary.bias": (1,),
    }
    again = value_head.load(tmp_path, model)
    assert torch.equal(again.summary.weight, head.summary.weight)
    assert again.summary.bias.item() == 0.25
    assert value_head.load(tmp_path / "elsewhere", model) is None


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_files_of_llamafactory_are_read(name, tmp_path):
    """Its older releases pickle the same names; one of half precision is read as float32."""
    state = {WEIGHT: torch.arange(32.0).bfloat16()[None], BIAS: torch.tensor([2.0])}
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    head = value_head.load(tmp_path, build_model())
    assert head(torch.ones(3, 32)).tolist() == [31 * 16 + 2.0] * 3


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


BAD = {
    "size": ({WEIGHT: torch.zeros(1, 64), BIAS: torch.zeros(1)}, r"\(1, 64\).*\(1, 32\)"),
    "key": ({"score.weight": torch.zeros(1, 32)}, f"has no {WEIGHT}; it holds score.weight"),
    "nan": ({WEIGHT: torch.full((1, 32), float("nan")), BIAS: torch.zeros(1)}, "not finite"),
    "none": ({}, "it holds nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_head_that_does_not_fit_is_refused(case, tmp_path):
    state, message = BAD[case]
    save_file(state, tmp_path / FILE)
    with pytest.raises(ModelError, match=message) as error:
        value_head.load(tmp_path, build_model())
    assert str(tmp_path) in str(error.value)
    assert "required" in str(error.value)


def test_a_damaged_head_is_refused_and_a_pickle_runs_no_code(tmp_path, capfd):
    model = build_model()
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is damaged"):
        value_head.load(tmp_path, model)
    (tmp_path / FILE).unlink()
    torch.save({WEIGHT: Evil()}, tmp_path / "value_head.bin")
    with pytest.raises(ModelError, match="is damaged"):
        value_head.load(tmp_path, model)
    torch.save([1, 2], tmp_path / "value_head.bin")
    with pytest.raises(ModelError, match="it holds nothing"):
        value_head.load(tmp_path, model)
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_that_predicts_trains_only_where_it_is_the_embedding(tied):
    model = build_model(tie_word_embeddings=tied)
    value_head.freeze_output_head(model)
    assert model.get_output_embeddings().weight.requires_grad is tied
    assert model.get_input_embeddings().weight.requires_grad


def test_a_missing_head_names_the_folder_that_this_run_wrote(tmp_path):
    keys = {"model_name_or_path": "m", "dataset": "a", "output_dir": str(tmp_path)}
    arguments = load_run({**keys, "do_train": True}, environ={})
    model = build_model()
    with pytest.raises(ModelError, match="Train one with stage: rm"):
        value_head.require(arguments, tmp_path / "model", model)
    value_head.write(ValueHead(32), tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ModelError, match=f"add adapter_name_or_path={tmp_path}"):
        value_head.require(arguments, tmp_path / "model", model)
