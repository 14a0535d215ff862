"""Whole runs with added tokens: trained, saved, resumed to the bit, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmray import local
from llmray.arguments.loading import load
from llmray.errors import CheckpointError, ModelError
from llmray.serve.answering import Answerer
from llmray.train.observers import read_log

RUN = {
    "stage": "sft",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "learning_rate": 0.01,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "fp32": True,
    "add_tokens": "word",
    "add_special_tokens": "<call>",
}
TUNING = {
    "lora": {"finetuning_type": "lora", "lora_rank": 2, "lora_dropout": 0.1},
    "lora without the embedding": {"finetuning_type": "lora", "additional_target": "norm"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "freeze with the embedding": {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 1,
        "freeze_extra_modules": "embed_tokens",
    },
    "full": {"finetuning_type": "full"},
}


@pytest.fixture
def keys(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    rows = [
        {"instruction": f"Say {i}.", "output": "<call>" + "word " * (i % 9 + 1)} for i in range(20)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    places = {"model_name_or_path": str(tiny_llama_dir), "dataset_dir": str(tmp_path)}
    return {**RUN, **places, "output_dir": str(tmp_path / "out")}


def train(keys: dict[str, object], **more: object) -> Path:
    arguments = load({**keys, **more}, environ={})
    assert local.train(arguments) == 0
    return Path(str(arguments.training.output_dir))


def weights(directory: Path) -> dict[str, bytes]:
    [path] = directory.glob("*model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", TUNING)
def test_a_resumed_run_equals_the_undisturbed_one(keys, tmp_path, name) -> None:
    tuning = {**TUNING[name], "lr_scheduler_type": "constant"}
    whole = train(keys, **tuning, output_dir=str(tmp_path / "whole"))
    parted = train(keys, **tuning, max_steps=2)
    parted = train(keys, **tuning)
    assert weights(parted) == weights(whole)
    steps = [record["current_steps"] for record in read_log(parted / "trainer_log.jsonl")]
    assert steps == [1, 2, 3, 4]


def test_what_was_saved_is_loaded_again_with_its_tokens(keys, tmp_path) -> None:
    """Of a whole model by transformers alone, of an adapter by the same run file."""
    full = train(keys, finetuning_type="full", output_dir=str(tmp_path / "full"))
    model = AutoModelForCausalLM.from_pretrained(full)
    tokenizer = AutoTokenizer.from_pretrained(full)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 384
    assert tokenizer.convert_tokens_to_ids(["word", "<call>"]) == [320, 321]
    assert tokenizer.decode([320, 321], skip_special_tokens=True) == "word"
    adapter = train(keys, finetuning_type="lora")
    words = {**keys, "adapter_name_or_path": str(adapter)}
    answerer = Answerer.load(load(words, environ={}))
    assert answerer.model.get_input_embeddings().weight.shape[0] == 384
    with pytest.raises(ModelError, match="write add_tokens: word and add_special_tokens: <call>"):
        Answerer.load(load({**words, "add_tokens": None, "add_special_tokens": None}, environ={}))
    train(keys, adapter_name_or_path=str(adapter), output_dir=str(tmp_path / "more"))
    more = load_file(tmp_path / "more" / "adapter_model.safetensors")
    [name] = [name for name in more if name.endswith("embed_tokens.weight")]
    first = load_file(adapter / "adapter_model.safetensors")[name]
    assert first.shape == more[name].shape == (384, 32)
    assert not torch.equal(first, more[name])


def test_a_checkpoint_of_another_vocabulary_is_refused(keys) -> None:
    train(keys, max_steps=2)
    with pytest.raises(CheckpointError, match="belongs to another run: data"):
        train(keys, add_tokens="word,other")
