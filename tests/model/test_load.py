"""Models from folders, whole and damaged."""

import json
import shutil

import pytest
import torch
from tiny import build_model, make_model

from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError
from llmray.model.attention import why_not_flat
from llmray.model.load import load_config, load_model


def loaded(directory, *, gradient_checkpointing=False, dtype=torch.float32, **keys):
    return load_model(
        directory,
        ModelArguments(**keys),
        dtype=dtype,
        device=torch.device("cpu"),
        gradient_checkpointing=gradient_checkpointing,
    )


@pytest.fixture
def folder(tmp_path, tiny_llama_dir):
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_file_in_the_dtype_asked_for(tiny_llama_dir, dtype, capfd):
    model = loaded(tiny_llama_dir, dtype=dtype)
    expected = build_model().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert not model.training
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("flash_attn", "own", "reason"),
    [
        ("auto", "sdpa", None),
        ("sdpa", "sdpa", None),
        ("disabled", "eager", "flash_attn: disabled asks for plain attention"),
    ],
)
def test_flash_attn(tiny_llama_dir, flash_attn, own, reason):
    model = loaded(tiny_llama_dir, flash_attn=flash_attn)
    assert model.config._attn_implementation == own
    assert why_not_flat(model) == reason


def test_from_scratch_depends_on_the_seed_and_not_on_the_file(tiny_llama_dir):
    def weights(seed):
        torch.manual_seed(seed)
        return loaded(tiny_llama_dir, train_from_scratch=True).state_dict()

    one, same, other, file = weights(1), weights(1), weights(2), build_model().state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], file[name])


@pytest.mark.parametrize("use_reentrant_gc", [None, False, True])
def test_gradient_checkpointing_only_when_asked(tiny_llama_dir, use_reentrant_gc):
    assert not loaded(tiny_llama_dir).is_activation_checkpointing
    model = loaded(tiny_llama_dir, gradient_checkpointing=True, use_reentrant_gc=use_reentrant_gc)
    assert model.is_activation_checkpointing
    layer = model.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": bool(use_reentrant_gc)}


def test_the_name_of_the_base_is_what_the_user_wrote(tiny_llama_dir):
    assert loaded(tiny_llama_dir, model_name_or_path="org/name").name_or_path == "org/name"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="is no folder"):
        loaded(tmp_path / "nothing")


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_config(folder, ModelArguments())


@pytest.mark.parametrize(
    "text",
    ["{", '{"model_type": "no_such_type"}', "{}", '{"model_type": "llama", "hidden_size": "x"}'],
)
def test_a_configuration_that_cannot_be_read(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_config(folder, ModelArguments())


def test_weights_that_are_missing(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(folder)


@pytest.mark.parametrize("size", [7, 1000, -5])
def test_weights_that_are_cut_short(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="is damaged"):
        loaded(folder)


def test_weights_of_fewer_layers_than_the_configuration_has(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks 9 of the model's weights, first model\.layers\.2"):
        loaded(folder)


def test_weights_of_another_size(folder):
    make_model(folder, hidden_size=16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(folder)


def test_an_architecture_that_cannot_recompute(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="disable_gradient_checkpointing: true"):
        loaded(make_model(tmp_path), gradient_checkpointing=True)
