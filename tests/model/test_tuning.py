"""Which parameters train, in which dtype; adapters made, loaded, merged."""

import json
import logging
from pathlib import Path

import pytest
import torch
from layouts import make_rows
from tiny import build_model
from tuned import logprobs, saved, shake, tuned

from llmray.errors import ArgumentsError, ModelError
from llmray.model import tuning
from llmray.model.head import TokenModel

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PER_LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]


def test_full_trains_everything_in_float32():
    model = tuned(build_model().bfloat16(), finetuning_type="full")
    assert set(tuning.trainable(model)) == {name for name, _ in model.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pure_bf16_stays_in_bf16():
    model = tuned(build_model().bfloat16(), finetuning_type="full", upcast=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"freeze_trainable_layers": 1},
            {f"model.layers.2.{name}" for name in PER_LAYER},
        ),
        (
            {"freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp,input_layernorm"},
            {
                *(f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
                "model.layers.0.input_layernorm.weight",
            },
        ),
        (
            {
                "freeze_trainable_layers": 2,
                "freeze_trainable_modules": "post_attention_layernorm",
                "freeze_extra_modules": "norm,embed_tokens",
            },
            {
                "model.layers.1.post_attention_layernorm.weight",
                "model.layers.2.post_attention_layernorm.weight",
                "model.norm.weight",
                "model.embed_tokens.weight",
            },
        ),
        (
            {"freeze_trainable_layers": 0, "freeze_extra_modules": "lm_head"},
            {"lm_head.weight"},
        ),
    ],
)
def test_freeze_trains_exactly_the_named_modules(keys, expected):
    model = build_model(num_hidden_layers=3, tie_word_embeddings=False).bfloat16()
    found = tuning.trainable(tuned(model, finetuning_type="freeze", **keys))
    assert set(found) == expected
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in expected} == {torch.bfloat16}


def test_freeze_takes_layer_1_for_no_expert_1():
    """Matched as a substring, `.1.` would also be a part of `layers.0.mlp.experts.1.`."""
    model = build_model(num_hidden_layers=12)
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    found = tuning.trainable(tuned(model, finetuning_type="freeze", freeze_trainable_layers=-2))
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    found = tuning.trainable(tuned(model, finetuning_type="freeze", freeze_trainable_layers=1))
    assert {name.split(".")[2] for name in found} == {"11"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mpl"},
            "freeze_trainable_modules=mpl: .* Did you mean mlp",
        ),
        (
            {"finetuning_type": "freeze", "freeze_extra_modules": "embed_token"},
            "freeze_extra_modules=embed_token: .* Did you mean embed_tokens",
        ),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 3},
            "freeze_trainable_layers=3, but the model has 2 layers",
        ),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "nothing trains"),
        ({"lora_target": "q_pro"}, "lora_target=q_pro: .* Did you mean q_proj"),
        ({"lora_target": "mlp"}, "lora_target=mlp: the model has no such module"),
        ({"additional_target": "head"}, "additional_target=head: .* Did you mean lm_head"),
    ],
)
def test_names_that_the_model_does_not_have_are_told_with_the_nearest(keys, message):
    with pytest.raises(ArgumentsError, match=message):
        tuned(**keys)


@pytest.mark.parametrize(
    ("arch", "target", "expected"),
    [
        ("llama", "all", LINEAR),
        ("llama", "q_proj,v_proj", {"q_proj", "v_proj"}),
        ("llama", "all,q_proj", LINEAR),
        ("llama", r".*\.(q|k)_proj", {"q_proj", "k_proj"}),
        ("gpt2", "all", {"c_attn", "c_proj", "c_fc"}),
        ("phi3", "all", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_lora_targets(arch, target, expected):
    model = tuned(build_model(arch), lora_target=target)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in tuning.trainable(model)}
    assert layers == expected
    assert not any("lm_head" in name for name in tuning.trainable(model))


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 2.0),  # alpha is twice the rank where it is not given
        ({"lora_rank": 4, "lora_alpha": 16}, 4.0),
        ({"lora_rank": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),  # alpha / sqrt(rank)
    ],
)
def test_lora_rank_alpha_and_scale(keys, scale):
    model = tuned(lora_dropout=0.25, **keys)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == keys.get("lora_rank", 8)
    assert layer.scaling["default"] == scale
    assert layer.lora_dropout["default"].p == 0.25
    torch.testing.assert_close(logprobs(model), logprobs(build_model(amplify=2.0)))


def test_a_new_adapter_depends_on_the_seed_alone():
    def weights(seed, draws):
        torch.manual_seed(draws)  # whatever happened to the generator before
        return next(iter(tuning.trainable(tuned(seed=seed)).values()))

    assert torch.equal(weights(1, 5), weights(1, 6))
    assert not torch.equal(weights(1, 5), weights(2, 5))


def test_lora_leaves_the_base_in_its_dtype_and_trains_in_float32():
    model = tuned(build_model().bfloat16(), additional_target="norm")
    assert {p.dtype for p in tuning.trainable(model).values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    low = tuned(build_model().bfloat16(), upcast=False)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_additional_target_keeps_tied_weights_tied(target, tmp_path):
    model = tuned(additional_target=target)
    names = [n for n in tuning.trainable(model) if "modules_to_save" in n]
    assert len(names) == 1
    shake(model)
    base = model.get_base_model()
    embedding = base.get_input_embeddings().modules_to_save["default"].weight
    assert base.get_output_embeddings().modules_to_save["default"].weight is embedding
    again = tuned(adapter_name_or_path=saved(model, tmp_path))
    torch.testing.assert_close(logprobs(again), logprobs(model), atol=1e-6, rtol=0)


def test_an_adapter_reloads_to_the_same_logprobs_and_trains_on(tmp_path, caplog):
    model = tuned(lora_rank=4, additional_target="norm")
    shake(model)
    path = saved(model, tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= {
        file.name for file in tmp_path.iterdir()
    }
    with caplog.at_level(logging.INFO, "llmray"):
        again = tuned(adapter_name_or_path=path, lora_rank=8)
    assert "rank 4, alpha 8, as it was saved" in caplog.text
    assert list(tuning.trainable(again)) == list(tuning.trainable(model))
    assert torch.equal(logprobs(again), logprobs(model))


def test_all_adapters_but_the_last_are_merged(tmp_path):
    first = tuned()
    shake(first)
    paths = [saved(first, tmp_path / "first")]
    second = tuned(adapter_name_or_path=paths[0], create_new_adapter=True, lora_target="v_proj")
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in tuning.trainable(second)} == {"v_proj"}
    torch.testing.assert_close(logprobs(second), logprobs(first), atol=2e-6, rtol=0)
    shake(second, seed=2)
    paths.append(saved(second, tmp_path / "second"))

    both = tuned(adapter_name_or_path=",".join(paths))
    assert len(tuning.trainable(both)) == len(tuning.trainable(second))
    torch.testing.assert_close(logprobs(both), logprobs(second), atol=2e-6, rtol=0)
    answering = tuned(adapter_name_or_path=",".join(paths), is_trainable=False)
    assert not tuning.trainable(answering)
    assert not hasattr(answering, "peft_config")
    torch.testing.assert_close(logprobs(answering), logprobs(second), atol=2e-6, rtol=0)


def test_adapters_that_are_missing_damaged_or_foreign(tmp_path):
    with pytest.raises(ModelError, match=r"adapter_name_or_path=.*no such folder"):
        tuned(adapter_name_or_path=str(tmp_path / "nothing"))
    model = tuned()
    path = saved(model, tmp_path / "adapter")
    with pytest.raises(
        ModelError, match=r"for model.layers.0.mlp.down_proj it has .* \(64,\), the"
    ):
        tuned(build_model(intermediate_size=32), adapter_name_or_path=path)
    with pytest.raises(
        ModelError, match=r"modules that the model does not have, first .*layers\.1"
    ):
        tuned(build_model(num_hidden_layers=1), adapter_name_or_path=path)
    with pytest.raises(
        ModelError, match=r"weights for 14 modules .* An adapter of this very model"
    ):
        tuned(build_model("gpt2"), adapter_name_or_path=path)
    weights = Path(path, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"adapter file in .* is damaged"):
        tuned(adapter_name_or_path=path)


def test_an_adapter_whose_files_differ_in_rank_is_refused(tmp_path):
    path = saved(tuned(lora_rank=4, lora_rank_pattern={r".*\.0\..*": 2}), tmp_path / "adapter")
    assert tuning.trainable(tuned(adapter_name_or_path=path))
    file = Path(path, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 8}))
    with pytest.raises(ModelError, match=r"says rank 8 in adapter_config.json, and .* rank 4"):
        tuned(adapter_name_or_path=path)


@pytest.mark.parametrize("target", ["additional_target", "lora_target"])
def test_an_adapter_of_another_vocabulary_is_refused(target, tmp_path):
    tied = {"tie_word_embeddings": False}
    path = saved(tuned(build_model(vocab_size=328, **tied), **{target: "embed_tokens"}), tmp_path)
    with pytest.raises(ModelError, match="an embedding of 328 rows, and the model has 320"):
        tuned(build_model(**tied), adapter_name_or_path=path)


def test_an_adapter_of_another_name_is_told(tmp_path, caplog):
    path = saved(tuned(model_name_or_path="some/other-model"), tmp_path)
    model = build_model(amplify=2.0)
    model.name_or_path = "/models/other-model"
    tuned(model, adapter_name_or_path=path)
    assert "was made for" not in caplog.text
    model = build_model(amplify=2.0)
    model.name_or_path = "some/model"
    tuned(model, adapter_name_or_path=path)
    assert "was made for some/other-model and is put on some/model" in caplog.text


def test_an_adapter_in_a_folder_of_the_one_that_is_named(tmp_path):
    model = tuned()
    shake(model)
    saved(model, tmp_path / "adapters" / "inner")
    keys = {"adapter_name_or_path": str(tmp_path / "adapters"), "adapter_folder": "inner"}
    assert torch.equal(logprobs(tuned(**keys)), logprobs(model))
    with pytest.raises(ModelError, match="adapters/outer"):
        tuned(**{**keys, "adapter_folder": "outer"})


def test_the_share_of_trainable_parameters_is_told(caplog):
    with caplog.at_level(logging.INFO, "llmray"):
        tuned(lora_rank=2, lora_target="q_proj", print_param_status=True)
    # two layers, q_proj 32 -> 32: 2 * 2 * (32 + 32) = 256 of 28,832 + 256
    assert "256 of 29,088 parameters train (0.88 %), in float32; the rest is float32" in caplog.text
    assert "model.model.norm.weight (32,) float32 cpu frozen" in caplog.text
    assert "q_proj.lora_A.default.weight (2, 32) float32 cpu trains" in caplog.text


@pytest.mark.parametrize("keys", [{}, {"finetuning_type": "freeze"}, {"finetuning_type": "full"}])
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradients_reach_all_that_trains_under_checkpointing(keys, is_reentrant):
    """Without re-entry and with it; a frozen embedding must not cut the graph."""
    rows, results = make_rows(), []
    for checkpointed in (False, True):
        model = build_model(amplify=2.0)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
        model = tuned(model, **keys).train()
        shake(model)
        TokenModel(model, flat=True)(rows.flat).logprobs.sum().backward()
        results.append([p.grad for p in tuning.trainable(model).values()])
    for plain, recomputed in zip(*results, strict=True):
        assert recomputed.abs().max() > 0
        torch.testing.assert_close(recomputed, plain, atol=1e-5, rtol=1e-4)
