"""Aliases stand for keys, retired names explain themselves."""

import pytest

from llmray.arguments import names
from llmray.arguments.capabilities import NOT_BUILT, NOT_SUPPORTED
from llmray.arguments.loading import load
from llmray.arguments.run import FIELDS
from llmray.errors import ArgumentsError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"finetuning_type": "qlora"}, {"finetuning_type": "lora", "quantization_bit": 4}),
        (
            {"finetuning_type": "qlora", "quantization_bit": 8},
            {"finetuning_type": "lora", "quantization_bit": 8},
        ),
        ({"new_special_tokens": "<a>"}, {"add_special_tokens": "<a>"}),
        ({"use_cache": False}, {"use_kv_cache": False}),
        ({"quantization_method": "bitsandbytes"}, {"quantization_method": "bnb"}),
        ({"quantization_method": "bnb"}, {"quantization_method": "bnb"}),
        (
            {"train_mm_proj_only": True},
            {"freeze_language_model": True, "freeze_multi_modal_projector": False},
        ),
        ({"train_mm_proj_only": False}, {}),
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"gradient_checkpointing": True}, {"disable_gradient_checkpointing": False}),
        ({"gradient_checkpointing": "false"}, {"disable_gradient_checkpointing": True}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"use_liger_kernel": True}, {"enable_liger_kernel": True}),
        ({"warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
        ({"overwrite_output_dir": True}, {"overwrite_output_dir": True}),
        ({"save_safetensors": True}, {}),
        ({"use_cache": True, "use_kv_cache": True}, {"use_kv_cache": True}),
    ],
)
def test_what_a_name_stands_for(written, meant):
    assert names.resolve(written) == (meant, [])


def test_an_alias_may_not_contradict_its_key():
    _, problems = names.resolve({"use_cache": False, "use_kv_cache": True})
    assert len(problems) == 1
    assert "use_cache=false" in problems[0].text
    assert "use_kv_cache=true" in problems[0].text


@pytest.mark.parametrize("name", names.RETIRED)
def test_a_retired_name_says_what_to_do(name):
    resolved, problems = names.resolve({name: "something"})
    assert resolved == {}
    assert f"{name}=something: no longer a key." in problems[0].text
    assert problems[0].text.endswith(".")


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, retired in names.RETIRED.items() for v in retired.harmless]
)
def test_a_retired_name_may_say_what_is_so_anyway(name, value):
    assert names.resolve({name: value}) == ({}, [])


def test_no_other_name_is_a_key_and_all_stand_for_keys():
    others = (*names.ALIASES, *names.CONVERTED, *names.RETIRED)
    assert len(set(others)) == len(others)
    assert not set(others) & set(FIELDS)
    converted = {key for convert in names.CONVERTED.values() for key in convert(True)}
    assert {*names.ALIASES.values(), *converted} <= set(FIELDS)
    assert {key for key, _ in (*names.VALUES, *names.VALUE_HINTS)} <= set(FIELDS)


def test_a_wrong_value_of_an_alias_is_said_of_its_key():
    with pytest.raises(ArgumentsError, match="eval_strategy=sometimes"):
        load({"model_name_or_path": "m", "evaluation_strategy": "sometimes"}, environ={})


def test_every_name_of_transformers_is_known():
    from dataclasses import fields

    from transformers import Seq2SeqTrainingArguments

    theirs = {field.name for field in fields(Seq2SeqTrainingArguments)}
    assert theirs - set(FIELDS) - set(names.all_names()) == set()


def test_tables_of_what_does_not_work_name_keys():
    assert set(NOT_BUILT) | set(NOT_SUPPORTED) <= set(FIELDS)
    assert not set(NOT_BUILT) & set(NOT_SUPPORTED)
