"""Variants of LoRA on several architectures: DoRA, patterns, experts, embeddings, what is told."""

import logging

import pytest
import torch
from layouts import make_rows
from tiny import build_model
from tuned import adapted, logprobs, saved, shake, tuned

from llmray.errors import ArgumentsError
from llmray.model import tuning
from llmray.model.head import TokenModel

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "qwen3_moe"]
EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{name}"
    for layer in (0, 1)
    for name in ("down_proj", "gate_up_proj")
]


def trained(model):
    """`model` after a few updates on some rows."""
    torch.manual_seed(0)
    token_model = TokenModel(model.train(), flat=True)
    optimizer = torch.optim.AdamW(tuning.trainable(model).values(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = -token_model(make_rows().flat).logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "keys", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
def test_a_variant_trains_reloads_and_merges_to_the_same_logprobs(arch, keys, tmp_path):
    start = logprobs(build_model(arch, amplify=2.0))
    model = tuned(build_model(arch, amplify=2.0), **keys)
    torch.testing.assert_close(logprobs(model), start, atol=1e-5, rtol=0)
    end = logprobs(trained(model))
    assert (end - start).abs().max() > 0.01
    path = saved(model, tmp_path)
    again = tuned(build_model(arch, amplify=2.0), adapter_name_or_path=path, **keys)
    assert torch.equal(logprobs(again), end)
    answering = tuned(
        build_model(arch, amplify=2.0), adapter_name_or_path=path, is_trainable=False, **keys
    )
    torch.testing.assert_close(logprobs(answering), end, atol=2e-5, rtol=0)


def test_dora_trains_magnitudes_that_begin_as_the_norms_of_the_rows():
    """https://arxiv.org/abs/2402.09353, section 4: m is the norm of W over its inputs."""
    model = tuned(use_dora=True, lora_target="q_proj")
    [name, *_] = [n for n in tuning.trainable(model) if "magnitude" in n]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert "layers.0.self_attn.q_proj" in name
    norms = layer.base_layer.weight.norm(dim=1)
    torch.testing.assert_close(tuning.trainable(model)[name], norms)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r".*layers\.1\..*\.q_proj", {"model.layers.1.self_attn.q_proj"}),
        ([r".*\.\d{1,2}\.self_attn\.v_proj"], {f"model.layers.{i}.self_attn.v_proj" for i in "01"}),
        # what an expression matches besides linear modules gets nothing
        (r".*layers\.0\.mlp.*", {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        ("layers.1.self_attn.q_proj", {"model.layers.1.self_attn.q_proj"}),
        ("lm_head", {"lm_head"}),
    ],
)
def test_expressions_and_parts_of_names(target, expected):
    assert adapted(tuned(lora_target=target)) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_target": "q_proj$"}, r"matches no module. It must match a whole name, such as"),
        ({"lora_target": "(q_proj"}, r"\(q_proj is no regular expression"),
        ({"lora_rank_pattern": {"q_pro": 2}}, "lora_rank_pattern=q_pro: .* Did you mean q_proj"),
        ({"lora_alpha_pattern": {"q_pro": 2}}, "lora_alpha_pattern=q_pro: .* Did you mean q_proj"),
    ],
)
def test_what_matches_nothing_is_told(keys, message):
    with pytest.raises(ArgumentsError, match=message):
        tuned(**keys)


def test_ranks_and_alphas_of_single_modules():
    keys = {"lora_rank": 4, "lora_rank_pattern": {"q_proj": 2, r".*layers\.1\..*\.up_proj": 3}}
    layers = tuned(**keys).get_base_model().model.layers
    found = [
        (module.r["default"], module.scaling["default"])
        for module in (layers[0].self_attn.q_proj, layers[1].mlp.up_proj, layers[0].mlp.up_proj)
    ]
    assert found == [(2, 2.0), (3, 2.0), (4, 2.0)]
    keys |= {"lora_alpha": 12, "lora_alpha_pattern": {"up_proj": 6}}
    layers = tuned(**keys).get_base_model().model.layers
    found = [
        module.scaling["default"]
        for module in (layers[0].self_attn.q_proj, layers[1].mlp.up_proj, layers[0].mlp.up_proj)
    ]
    assert found == [6.0, 2.0, 1.5]


def test_all_leaves_experts_alone_and_says_how_to_name_them(caplog):
    with caplog.at_level(logging.INFO, "llmray"):
        model = tuned(build_model("qwen3_moe"))
    assert adapted(model) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"
    }
    assert "get no adapter; experts.down_proj, experts.gate_up_proj would add them" in caplog.text


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("experts", EXPERTS),
        ("gate_up_proj", EXPERTS[1::2]),
        ("experts.down_proj", EXPERTS[::2]),
        (r".*layers\.1\..*_up_proj", EXPERTS[3:]),
    ],
)
def test_experts_are_reached_by_name(target, expected, tmp_path):
    model = tuned(build_model("qwen3_moe", amplify=2.0), lora_target=target)
    config = model.peft_config["default"]
    assert sorted(config.target_parameters) == sorted(expected)
    assert not config.target_modules
    end = logprobs(trained(model))
    path = saved(model, tmp_path)
    again = tuned(build_model("qwen3_moe", amplify=2.0), adapter_name_or_path=path)
    assert torch.equal(logprobs(again), end)
    answering = tuned(
        build_model("qwen3_moe", amplify=2.0), adapter_name_or_path=path, is_trainable=False
    )
    torch.testing.assert_close(logprobs(answering), end, atol=2e-5, rtol=0)


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_all_and_experts_of_other_architectures(arch):
    model = tuned(build_model(arch, amplify=2.0), lora_target="all,experts")
    assert any("self_attn" in name for name in adapted(model))
    before = {n: p.detach().clone() for n, p in tuning.trainable(model).items()}
    after = tuning.trainable(trained(model))
    assert {n for n in before if "experts" in n}
    assert {n for n in before if torch.equal(before[n], after[n])} == set()


@pytest.mark.parametrize("keys", [{"lora_dropout": 0.1}, {"use_dora": True}, {"pissa_init": True}])
def test_experts_take_no_variant(keys):
    [key] = keys
    with pytest.raises(ArgumentsError, match=rf"{key}=.* with lora_target model.*experts"):
        tuned(build_model("qwen3_moe"), lora_target="experts", **keys)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "embed_tokens,lm_head"])
def test_merging_an_adapter_of_tied_weights_unties_them(target, tmp_path):
    """Added into the one matrix, each would change the other's half of the model."""
    model = tuned(lora_target=f"{target},q_proj")
    shake(model)
    path = saved(model, tmp_path / "adapter")
    assert torch.equal(logprobs(tuned(adapter_name_or_path=path)), logprobs(model))
    merged = tuned(adapter_name_or_path=path, is_trainable=False)
    torch.testing.assert_close(logprobs(merged), logprobs(model), atol=2e-5, rtol=0)
    whole = type(merged).from_pretrained(saved(merged, tmp_path / "whole"))
    torch.testing.assert_close(logprobs(whole), logprobs(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_other_training_goes_on_from_merged_adapters(kind, tmp_path):
    adapter = tuned()
    shake(adapter)
    path = saved(adapter, tmp_path)
    model = tuned(adapter_name_or_path=path, finetuning_type=kind)
    torch.testing.assert_close(logprobs(model), logprobs(adapter), atol=1e-5, rtol=0)
    own = tuning.trainable(tuned(finetuning_type=kind))
    assert list(tuning.trainable(model)) == list(own)
    assert not hasattr(model, "peft_config")


def test_status_counts_by_dtype():
    """q_proj of two layers, 32 to 32, rank 2: 2 * 2 * (32 + 32) = 256; a norm of 32 beside it."""
    keys = {"lora_rank": 2, "lora_target": "q_proj", "additional_target": "model.norm"}
    told = tuning.status(tuned(build_model().bfloat16(), **keys))
    assert told["trainable"] == 256 + 32
    assert told["trainable_by_dtype"] == {"float32": 256 + 32}
    assert told["frozen_by_dtype"] == {"bfloat16": told["total"] - 288}
    assert told["share"] == 288 / told["total"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert told["parameters"][name] == {"shape": [2, 32], "dtype": "float32"}
    assert len(told["parameters"]) == 5
