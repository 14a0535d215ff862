"""Weights in .bin files: written by us, read only where it is allowed, and never as code."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_model, make_model

from llmray.arguments.loading import load
from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError, StoreError
from llmray.model import pickled, tuning
from llmray.model.load import load_model

RUN = {"model_name_or_path": "m", "template": "chatml", "infer_dtype": "float32"}


def loaded(directory, **keys):
    return load_model(
        directory,
        ModelArguments(**keys),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )


@pytest.fixture
def folder(tmp_path, tiny_llama_dir):
    """A model of which the weights are pickled."""
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    pickled.convert(directory)
    return directory


def test_shards_become_bin_files_with_an_index(tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path, max_shard_size=40_000)
    expected = {k: v for p in tmp_path.glob("*.safetensors") for k, v in load_file(p).items()}
    pickled.convert(tmp_path)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    files = {path.name for path in tmp_path.iterdir()} - {"config.json", "generation_config.json"}
    assert files == {"pytorch_model.bin.index.json", *index["weight_map"].values()}
    assert len(files) > 2
    found = {}
    for name in sorted(set(index["weight_map"].values())):
        part = torch.load(tmp_path / name, weights_only=True)
        assert set(part) == {key for key, file in index["weight_map"].items() if file == name}
        found |= part
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    again = loaded(tmp_path, allow_pickled_weights=True)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_pickled_weights_are_read_only_where_it_is_allowed(folder):
    with pytest.raises(ModelError, match=r"pickles alone \(pytorch_model.bin\).*allow_pickled"):
        loaded(folder)
    model = loaded(folder, allow_pickled_weights=True)
    assert torch.equal(model.lm_head.weight, build_model().lm_head.weight)


def test_code_in_a_pickle_does_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    assert pickle.dumps(Evil())
    with pytest.raises(ModelError, match="damaged, or holds more than weights"):
        loaded(folder, allow_pickled_weights=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_pickle_that_is_cut_short(folder, size):
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"damaged|cannot be loaded"):
        loaded(folder, allow_pickled_weights=True)


def test_safetensors_go_before_pickles(folder, tiny_llama_dir):
    shutil.copy(tiny_llama_dir / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    assert torch.equal(loaded(folder).lm_head.weight, build_model().lm_head.weight)


def test_an_adapter_that_is_pickled_alone(tmp_path):
    base = make_model(tmp_path / "base")
    arguments = load({**RUN, "do_train": True, "dataset": "d", "output_dir": "o"}, environ={})
    tuned = tuning.apply(loaded(base), arguments, is_trainable=True, upcast=True)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    safe = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    named = {**RUN, "adapter_name_or_path": str(tmp_path / "adapter")}
    with pytest.raises(ModelError, match=r"pickles alone \(adapter_model.bin\)"):
        tuning.apply(loaded(base), load(named, environ={}), is_trainable=False, upcast=False)
    allowed = load({**named, "allow_pickled_weights": True}, environ={})
    tuning.apply(loaded(base), allowed, is_trainable=False, upcast=False)


def test_a_full_disk_while_pickling(tiny_llama_dir, tmp_path, monkeypatch):
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")

    def full(tensors, file):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StoreError, match=r"pytorch_model.bin could not be written.*disk may be"):
        pickled.convert(directory)
