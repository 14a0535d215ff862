"""Weights in mapped files: counted as shared until something else holds them."""

import sys

import pytest
import torch
from tiny import make_model, make_tokenizer

from llmray.arguments.loading import load as load_arguments
from llmray.model import converted, load, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    make_tokenizer(home)
    make_model(home)
    return home


def loaded(directory, dtype, **how):
    keys = {"model_name_or_path": str(directory), "dataset": "d", "output_dir": "o"}
    arguments = load_arguments({**keys, "template": "default", "stage": "sft"}, environ={})
    mapped.take()
    model = load.load_model(
        directory,
        arguments.model,
        dtype=dtype,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
        cutoff_len=32,
        **how,
    )
    [found] = mapped.take()
    return model, found


def test_weights_that_keep_their_dtype_are_shared(directory):
    model, found = loaded(directory, torch.float32)
    assert found.directory == str(directory)
    assert found.num_bytes == sum(4 * p.numel() for p in set(model.parameters()))
    assert found.num_mapped == found.num_bytes
    assert mapped.take() == []


def test_weights_that_are_converted_are_copies(directory):
    _, found = loaded(directory, torch.bfloat16)
    assert found.num_mapped == 0
    assert found.num_bytes > 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path))
    return tmp_path / "models"


def test_what_several_runs_convert_is_converted_once_and_mapped(directory, cache, caplog):
    alone, _ = loaded(directory, torch.bfloat16)
    first, counted = loaded(directory, torch.bfloat16, is_shared=True)
    assert counted.num_mapped == counted.num_bytes > 0
    assert counted.directory == str(directory)
    [made] = [path for path in cache.iterdir() if path.is_dir()]
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    second, counted = loaded(directory, torch.bfloat16, is_shared=True)
    assert counted.num_mapped == counted.num_bytes
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    for model in (first, second):
        assert model.generation_config == alone.generation_config
        assert model.llmray_directory == directory
        assert model.name_or_path == alone.name_or_path
        weights = model.state_dict()
        for name, weight in alone.state_dict().items():
            assert weight.dtype == weights[name].dtype
            assert torch.equal(weight, weights[name])


def test_what_needs_no_conversion_is_not_written_again(directory, cache):
    _, found = loaded(directory, torch.float32, is_shared=True)
    assert found.num_mapped == found.num_bytes
    assert not cache.exists()


def test_what_is_trained_itself_leaves_the_shared_weights(directory, cache):
    model, _ = loaded(directory, torch.bfloat16, is_shared=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again, _ = loaded(directory, torch.bfloat16, is_shared=True)
    assert any(parameter.any() for parameter in again.parameters())


def test_a_disk_without_room_leaves_each_its_own(directory, cache, monkeypatch, caplog):
    full = lambda _: type("Usage", (), {"free": 1 << 10})  # noqa: E731
    monkeypatch.setattr(converted.shutil, "disk_usage", full)
    _, found = loaded(directory, torch.bfloat16, is_shared=True)
    assert found.num_mapped == 0
    assert "0 MiB free" in caplog.text
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_weights_that_are_read_back_otherwise_are_not_shared(directory, cache, monkeypatch, caplog):
    save = converted.PreTrainedModel.save_pretrained

    def wrong(model, place):
        with torch.no_grad():
            model.get_input_embeddings().weight[3, 1] += 1
        save(model, place)
        with torch.no_grad():
            model.get_input_embeddings().weight[3, 1] -= 1

    monkeypatch.setattr(converted.PreTrainedModel, "save_pretrained", wrong)
    _, found = loaded(directory, torch.bfloat16, is_shared=True)
    assert found.num_mapped == 0
    assert "is read back otherwise" in caplog.text
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_leaves_each_its_own(
    directory, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "file"))
    _, found = loaded(directory, torch.bfloat16, is_shared=True)
    assert found.num_mapped == 0
    assert "converts weights of its own" in caplog.text
