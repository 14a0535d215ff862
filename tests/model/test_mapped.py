"""Weights in mapped files: counted as shared until something else holds them."""

import sys

import pytest
import torch
from tiny import make_model, make_tokenizer

from llmray.arguments.loading import load as load_arguments
from llmray.model import load, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    make_tokenizer(home)
    make_model(home)
    return home


def loaded(directory, dtype):
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
