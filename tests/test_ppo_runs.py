"""Stage ppo as a user runs it, without Ray: a tiny model with rewards that can be verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ppo_rows import told
from safetensors.torch import load_file
from tiny import SIZES, build_model, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from llmray import local, reinforcement
from llmray.arguments.loading import load
from llmray.data.conversation import Conversation, Message
from llmray.data.tokenizer import renderer
from llmray.errors import (
    ArgumentsError,
    DataError,
    LlmrayError,
    ModelError,
    RewardError,
    TrainingError,
)
from llmray.model import fitting, memory, value_head
from llmray.model.memory import Estimate
from llmray.rl import reward_files
from llmray.rl.handles import Answer
from llmray.rl.prompts import Prompt
from llmray.rl.reward_model import ModelReward
from llmray.rl.rewards import Elsewhere
from llmray.rl.rollout import Texts
from llmray.serve import reward_server
from llmray.train import decoding, device_memory, feed
from llmray.train.observers import read_log
from llmray.train.score import Scorer

RUN: dict[str, Any] = {
    "stage": "ppo",
    "do_train": True,
    "template": "chatml",
    "dataset": "rows",
    "cutoff_len": 64,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "learning_rate": 0.02,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "fp32": True,
    "report_to": "none",
    "reward_model": "letter_rewards:share_of_e",
    "max_new_tokens": 6,
    "top_p": 1.0,
    "top_k": 0,
    "temperature": 1.0,
}
GRPO = {"advantage_estimator": "grpo", "ppo_num_samples": 3}
ESTIMATORS = {"gae": {}, "grpo": GRPO}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model`, and a set of prompts."""
    root = tmp_path_factory.mktemp("ppo")
    make_tokenizer(root / "model")
    make_model(root / "model")
    rows = [{"instruction": f"Say {i}.", "output": "word " * (i % 4 + 1)} for i in range(24)]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "answers.json").write_text(json.dumps([{"output": "word"}] * 8))
    prompts = [{"instruction": f"Say {i}.", "output": ""} for i in range(12)]
    (root / "prompts.json").write_text(json.dumps(prompts))
    info = {name: {"file_name": f"{name}.json"} for name in ("rows", "answers", "prompts")}
    (root / "dataset_info.json").write_text(json.dumps(info))
    return root


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRAY_CACHE", str(folder / "cache"))


def keys_of(folder: Path, output: Path, **keys: Any) -> dict[str, Any]:
    places = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder)}
    return {**RUN, **places, "output_dir": str(output), **keys}


def train(folder: Path, output: Path, **keys: Any) -> Path:
    merged = {k: v for k, v in keys_of(folder, output, **keys).items() if v is not ...}
    assert local.train(load(merged, environ={})) == 0
    return output


def weights(output: Path) -> dict[str, bytes]:
    """All that a run learned, to the bit."""
    files = sorted(output.glob("*.safetensors"))
    assert files
    return {
        f"{file.name}: {name}": tensor.float().numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_goes_on_bitwise_from_a_checkpoint(
    estimator: str, folder: Path, tmp_path: Path
) -> None:
    """The weight of the divergence, moments of scores, optimizer, random numbers and prompts."""
    keys = {**ESTIMATORS[estimator], "lora_dropout": 0.1, "rollout_log_steps": 1}
    keys |= {"ppo_score_norm": True} if estimator == "gae" else {}
    whole = train(folder, tmp_path / "whole", **keys)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-4")
    before = weights(whole)
    train(folder, again, **keys, resume_from_checkpoint=True)
    assert weights(again) == before
    assert told(again) == told(whole)
    assert (again / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    assert [record["current_steps"] for record in told(whole) if "beta" in record] == [1, 2, 3, 4]
    values = (whole / "value_head.safetensors").exists()
    assert values == (estimator == "gae")
    if values:  # a new critic knows nothing, and claims nothing
        assert told(whole)[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)


# ---- policies -----------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "learning_rate": 0.003},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 0.003},
    "qlora": {"quantization_bit": 4, "model_name_or_path": "@wide"},
    "pissa": {"pissa_init": True},
    "continued": {"adapter_name_or_path": "@continued"},
    "reference": {"ref_model": "@other"},
    "the same as reference": {"ref_model": "@model", "temperature": 0.5},
}


@pytest.mark.parametrize("method", METHODS)
def test_ways_to_tune(method: str, folder: Path, tmp_path: Path) -> None:
    """The policy starts at its reference, but where that is another model, and leaves it.

    Both are read at the temperature of sampling.
    """
    keys = {
        key: str(folder / value[1:]) if str(value).startswith("@") else value
        for key, value in METHODS[method].items()
    }
    if method == "continued":
        train(folder, folder / "continued", max_steps=1, save_strategy="no")
    if method == "qlora":
        make_tokenizer(folder / "wide")
        make_model(folder / "wide", hidden_size=64)
    if method == "reference":
        make_tokenizer(folder / "other")
        make_model(folder / "other", amplify=1.5)
    log = told(train(folder, tmp_path / "out", max_steps=3, save_strategy="no", **keys))
    kl = [record["kl"] for record in log if "kl" in record]
    assert (abs(kl[0]) < 1e-4) == (method != "reference")
    assert abs(kl[2]) > 1e-4
    assert all(record["ratio_error"] < 1e-4 for record in log if "ratio_error" in record)


def test_a_step_is_a_rollout_of_several_batches(folder: Path, tmp_path: Path) -> None:
    """Two prompts on a device, twice, three times as many in the buffer, two responses to each."""
    keys = {"ppo_buffer_size": 3, "ppo_num_samples": 2, "ppo_epochs": 2, "rollout_log_steps": 1}
    output = train(folder, tmp_path / "out", max_steps=2, save_strategy="no", **keys)
    log = [record for record in told(output) if "num_updates" in record]
    # 12 prompts have 24 responses; a mini-batch holds 4 of them
    assert [record["num_updates"] for record in log] == [2 * 6, 2 * 6]
    assert log[-1]["epoch"] == 1.0
    lines = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    assert {"prompt", "response", "score", "kl"} <= set(lines[0])


def test_unused_memory_is_given_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(device_memory, "release", devices.append)
    train(folder, tmp_path / "out", torch_empty_cache_steps=2, save_strategy="no")
    assert len(devices) == 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"max_new_tokens": 4}, [7, 24]),
        ({"max_new_tokens": 0, "max_length": 9}, [9, 20]),
        ({"max_new_tokens": 4, "stage": "sft", "reward_model": ...}, [3, 20]),
    ],
)
def test_memory_is_estimated_for_prompts_with_their_responses(
    keys: dict[str, Any], expected: list[int], folder: Path, tmp_path: Path
) -> None:
    merged = {k: v for k, v in keys_of(folder, tmp_path, **keys).items() if v is not ...}
    assert feed._answered(np.array([3, 20]), load(merged, environ={})).tolist() == expected


def test_memory_is_estimated_with_the_reward_models_of_this_process(
    folder: Path, tmp_path: Path, reward_dir: Path
) -> None:
    """Of whole models and of adapters with their base, in float32 or few bits; not of actors."""
    base = 4 * sum(p.numel() for p in build_model().parameters())
    cpu = torch.device("cpu")

    def bytes_here(*elsewhere: str, **keys: Any) -> int:
        merged = keys_of(folder, tmp_path, **keys)
        arguments = load({k: v for k, v in merged.items() if v is not ...}, environ={})
        others = Elsewhere({name: [] for name in elsewhere}, lambda handle, reason: None, tmp_path)
        return reward_files.bytes_here(arguments, folder / "model", cpu, others)

    full = {"reward_model": str(reward_dir), "reward_model_type": "full"}
    assert bytes_here(**full) == pytest.approx(base, rel=0.02)
    assert bytes_here(reward_model="an/adapter") == pytest.approx(base, rel=0.02)
    both = {**full, "reward_model": f"{reward_dir},letter_rewards:share_of_e,{reward_dir}"}
    assert bytes_here(**both) == 2 * bytes_here(**full)
    assert bytes_here(str(reward_dir), **full) == 0
    assert bytes_here(**full, infer_dtype="bfloat16") == bytes_here(**full) / 2
    assert bytes_here(**full, reward_model_quantization_bit=4) < 0.8 * bytes_here(**full)
    assert bytes_here(stage="sft", reward_model=...) == 0


def test_a_reward_model_that_leaves_no_room_is_told_before_anything_is_loaded(
    folder: Path, tmp_path: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the policy alone: with it the run goes on, with a reward model too it does not."""
    seen: list[Estimate] = []

    def look(*words: Any, **named: Any) -> Estimate:
        seen.append(memory.estimate_for(*words, **named))
        return seen[-1]

    monkeypatch.setattr(fitting, "estimate_for", look)
    train(folder, tmp_path / "out", max_steps=1)
    free = int(1.2 * seen[0].peak)
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(reward_files, "inference_dtype", lambda asked, device: torch.complex128)
    train(folder, tmp_path / "again", max_steps=1)
    keys = {"reward_model": str(reward_dir), "reward_model_type": "full", "max_steps": 1}
    with pytest.raises(ModelError, match=r"a worker needs about .* too few"):
        train(folder, tmp_path / "both", **keys, disable_gradient_checkpointing=False)


def test_draws_are_compared_with_what_learning_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a difference ends the run, in bf16 it is a figure; at the run's temperature."""
    keys = {"temperature": 0.8, "max_new_tokens": 12, "max_steps": 2, "save_strategy": "no"}
    log = told(train(folder, tmp_path / "fp32", **keys))
    assert all(0 < record["sampling_error"] < 2e-6 for record in log)
    exact = decoding.logprobs_of
    monkeypatch.setattr(decoding, "logprobs_of", lambda *args: exact(*args) - 0.2)
    with pytest.raises(TrainingError, match=r"step 1 were drawn .* differ by 0\.2 nats"):
        train(folder, tmp_path / "off", **keys)
    log = told(train(folder, tmp_path / "bf16", **{**keys, "fp32": False, "bf16": True}))
    assert log[0]["sampling_error"] == pytest.approx(0.2, abs=0.05)


# ---- rewards ------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Answer, float]]:
    """What reward models are asked in a run, and what they answer."""
    found: list[tuple[Answer, float]] = []
    whole = ModelReward.score

    def score(self: ModelReward, answers: list[Answer]) -> list[float]:
        scores = whole(self, answers)
        found.extend(zip(answers, scores, strict=True))
        return scores

    monkeypatch.setattr(ModelReward, "score", score)
    return found


@pytest.fixture(scope="module")
def reward_dir(folder: Path) -> Path:
    """A whole reward model with the policy's tokenizer."""
    place = folder / "reward"
    make_tokenizer(place)
    make_model(place, amplify=3.0)
    value_head.write(value_head.create(build_model(), 0), place)
    return place


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_model_is_fetched_and_loaded_as_the_policy(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """With its tokens and number formats; of bits a whole model has its own."""
    keys = {"hf_hub_token": "a token", "allow_pickled_weights": True, "quantization_bit": 4}
    keys |= {"double_quantization": False, "reward_model": "org/one", "reward_model_type": kind}
    arguments = load(keys_of(folder, tmp_path, **keys), environ={})
    asked = reward_files.run_file("org/one", arguments, "base").model
    assert asked.hf_hub_token is not None
    assert asked.hf_hub_token.get_secret_value() == "a token"
    assert (asked.allow_pickled_weights, asked.double_quantization) == (True, False)
    assert asked.quantization_bit == (4 if kind == "lora" else None)
    assert asked.model_name_or_path == ("base" if kind == "lora" else "org/one")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_adapter_has_the_tokens_of_the_run_and_a_whole_model_its_own(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    keys = {"add_tokens": ["wug"], "add_special_tokens": ["<a>", "<b>"], "resize_vocab": True}
    keys |= {"new_special_tokens_config": "tokens.yaml", "init_special_tokens": "desc_init"}
    keys |= {"split_special_tokens": True}
    run = keys_of(folder, tmp_path, **keys, reward_model="org/one", reward_model_type=kind)
    arguments = load(run, environ={})
    found = reward_files.run_file("org/one", arguments, "base").flat()
    expected = keys if kind == "lora" else load({"model_name_or_path": "any"}, environ={}).flat()
    assert {key: found[key] for key in keys} == {key: expected[key] for key in keys}


@pytest.mark.parametrize("template", [None, "chatml", "qwen", "llama3", "llama2"])
def test_a_response_that_ends_is_scored_as_stage_rm_writes_it(
    template: str | None, folder: Path
) -> None:
    """Policy and reward model read the same last token of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = load({"model_name_or_path": "any", "template": template}, environ={})
    turns = renderer(arguments.data, tokenizer).turns(
        Conversation((Message("user", "Why?"), Message("assistant", "So.")))
    )
    source, target = turns[-1].source, turns[-1].target
    stops = {tokenizer.eos_token_id}
    found = reinforcement.ending(arguments.data, tokenizer, tuple(stops))
    if template == "llama3":  # its own token is none of this tokenizer
        assert found is None
        return
    assert found is not None
    said = Conversation((Message("user", "Why?"),))
    prompt = Prompt(tokenizer.encode(source, add_special_tokens=False), 0, 0, said)
    response = [*tokenizer.encode("So.", add_special_tokens=False), found[0]]
    assert Texts(tokenizer, ending=found).answer("a", prompt, response).text == source + target
    assert target.endswith("\n") == (template in (None, "chatml", "qwen"))


def scorer_of(place: Path, **keys: Any) -> Scorer:
    return Scorer.load(load({"model_name_or_path": str(place), **keys}, environ={}))


@pytest.mark.parametrize("policy", ["lora", "full"])
def test_an_adapter_as_reward_model(
    policy: str, folder: Path, tmp_path: Path, scored: list[tuple[Answer, float]]
) -> None:
    """The policy of an earlier run stands for what stage rm writes: an adapter and a head."""
    adapter = train(folder, tmp_path / "adapter", max_steps=1)
    keys = {"reward_model": str(adapter), "max_steps": 2, "save_strategy": "no"}
    keys |= {"finetuning_type": policy, "learning_rate": 0.003}
    log = told(train(folder, tmp_path / "out", **keys))
    run = {"template": "chatml", "adapter_name_or_path": str(adapter)}
    alone = scorer_of(folder / "model", **run).score([answer.text for answer, _ in scored])
    assert [score for _, score in scored] == pytest.approx(alone, abs=1e-5)
    assert log[0]["score"] == pytest.approx(sum(alone[:4]) / 4, abs=1e-5)
    assert all(answer.text.startswith("<|im_start|>user\nSay ") for answer, _ in scored)


def test_an_adapter_that_was_trained_with_added_tokens_as_reward_model(
    folder: Path, tmp_path: Path, scored: list[tuple[Answer, float]]
) -> None:
    """The keys that add them stand once in the run, for the policy and for the adapter."""
    described = tmp_path / "described.yaml"
    described.write_text('"<c>": a word\n')
    added = {"add_special_tokens": "<a>,<b>", "add_tokens": "wug", "max_steps": 1}
    added |= {"new_special_tokens_config": str(described), "init_special_tokens": "desc_init"}
    adapter = train(folder, tmp_path / "adapter", **added)
    train(folder, tmp_path / "out", reward_model=str(adapter), save_strategy="no", **added)
    run = {"template": "chatml", "adapter_name_or_path": str(adapter), **added}
    alone = scorer_of(folder / "model", **run).score([answer.text for answer, _ in scored])
    assert [score for _, score in scored] == pytest.approx(alone, abs=1e-5)


def test_a_whole_reward_model_and_the_same_as_a_server(
    folder: Path, tmp_path: Path, reward_dir: Path, scored: list[tuple[Answer, float]]
) -> None:
    short = {"max_steps": 2, "save_strategy": "no"}
    keys = {"reward_model": str(reward_dir), "reward_model_type": "full", **short}
    whole = told(train(folder, tmp_path / "full", **keys))
    alone = scorer_of(reward_dir, template="chatml")
    expected = alone.score([answer.text for answer, _ in scored])
    assert [score for _, score in scored] == pytest.approx(expected, abs=1e-5)
    for address in served(alone):
        keys = {"reward_model": address, "reward_model_type": "api", **short}
        asked = told(train(folder, tmp_path / "api", **keys))
    for one, other in zip(whole, asked, strict=True):
        assert one.get("score") == pytest.approx(other.get("score"), abs=1e-4)
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-3)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_reward_model_shares_the_thread_where_torch_uses_all_cores(
    num_threads: int,
    folder: Path,
    tmp_path: Path,
    reward_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []
    scored = ModelReward.score

    def score(self: ModelReward, answers: Sequence[Answer]) -> list[float]:
        threads.append(threading.current_thread() is threading.main_thread())
        return scored(self, answers)

    monkeypatch.setattr(ModelReward, "score", score)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    keys = {"reward_model": str(reward_dir), "reward_model_type": "full"}
    train(folder, tmp_path / "out", max_steps=1, save_strategy="no", **keys)
    assert set(threads) == {num_threads == 2}


def served(scorer: Scorer) -> Iterator[str]:
    """The address of a reward server in a thread, as long as it is iterated."""
    options = reward_server.Options(port=0)
    listening = reward_server.listen(options)
    made = reward_server.server(scorer, "tiny", options)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    host, port = listening.getsockname()
    try:
        yield f"http://{host}:{port}{reward_server.ROUTE}"
    finally:
        made.should_exit = True
        thread.join(60)
        listening.close()


OTHER_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("kind", ["classifier", "head"])
def test_a_reward_model_with_words_of_its_own(
    kind: str, folder: Path, tmp_path: Path, scored: list[tuple[Answer, float]]
) -> None:
    """Another tokenizer, and its own chat template: the conversation reaches it, not the text."""
    place = tmp_path / "reward"
    tokenizer = make_tokenizer(place)
    tokenizer.add_tokens(["assistant]"])
    tokenizer.chat_template = OTHER_TEMPLATE
    tokenizer.save_pretrained(place)
    if kind == "classifier":
        config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 324}, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(place)
    else:
        make_model(place, amplify=3.0, vocab_size=324)
        value_head.write(value_head.create(build_model(), 0), place)
    keys = {"reward_model": str(place), "reward_model_type": "full"}
    train(folder, tmp_path / "out", max_steps=1, save_strategy="no", **keys)
    texts = []
    for answer, _ in scored:
        assert answer.conversation is not None
        [asked, said] = answer.conversation.messages
        texts.append(f"[user] {asked.content}\n[assistant] {said.content}\n")
        assert asked.content.startswith("Say ")
        assert said.content == answer.response
    assert AutoTokenizer.from_pretrained(place).tokenize(texts[0]).count("assistant]") == 1
    assert [score for _, score in scored] == pytest.approx(scorer_of(place).score(texts), abs=1e-5)


def test_rewards_are_added_by_their_weights(folder: Path, tmp_path: Path) -> None:
    keys = {
        "reward_model": "letter_rewards:share_of_e, letter_rewards:length",
        "reward_weights": "2,-0.1",
    }
    log = told(train(folder, tmp_path / "out", max_steps=2, save_strategy="no", **keys))
    for record in log[:2]:
        whole = 2 * record["score_share_of_e"] - 0.1 * record["score_length"]
        assert record["score"] == pytest.approx(whole, abs=1e-5)
        assert record["score_length"] > 0


def test_labels_of_the_data_reach_a_function(folder: Path, tmp_path: Path) -> None:
    """Their mean length is that of `word ` once to four times, in every step of this run."""
    keys = {"reward_model": "letter_rewards:length_of_label", "ppo_buffer_size": 6}
    log = told(train(folder, tmp_path / "out", max_steps=1, save_strategy="no", **keys))
    assert log[0]["score"] == pytest.approx(5 * 2.5)


def test_a_response_without_a_score_is_left_out_or_ends_the_run(
    folder: Path, tmp_path: Path
) -> None:
    keys = {"reward_model": "letter_rewards:refused_where_odd", "max_steps": 1}
    log = told(train(folder, tmp_path / "mask", reward_error="mask", **keys))
    assert 0 < log[0]["unscored"] < 4
    with pytest.raises(RewardError, match=r"refused_where_odd.*nan"):
        train(folder, tmp_path / "fail", **keys)


# ---- evaluation ---------------------------------------------------------------------------------

HELD_OUT = {"val_size": 6, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}


def test_held_out_prompts_are_answered_by_the_same_draws(folder: Path, tmp_path: Path) -> None:
    keys = {**HELD_OUT, "learning_rate": 0.0, "save_strategy": "no", "max_steps": 2}
    log = told(train(folder, tmp_path / "out", **keys))
    found = [
        {name: value for name, value in record.items() if name.startswith("eval_")}
        for record in log
        if "eval_score" in record
    ]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert found[0]["eval_kl"] == pytest.approx(0.0, abs=1e-4)
    assert set(found[0]) == {
        *("eval_score", "eval_score_deviation", "eval_kl"),
        *("eval_response_length", "eval_without_eos"),
    }


def test_a_run_may_end_with_its_best_policy(folder: Path, tmp_path: Path) -> None:
    keys = {**HELD_OUT, "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.1}
    output = train(folder, tmp_path / "out", **keys, plot_loss=True)
    drawn = {path.stem.removeprefix("training_") for path in output.glob("*.png")}
    assert drawn == {"loss", "score", "kl", "beta", "entropy", "response_length", "eval_score"}
    scores = {r["current_steps"]: r["eval_score"] for r in told(output) if "eval_score" in r}
    scores.pop(0, None)
    best = max(scores, key=lambda step: (scores[step], -step))
    assert weights(output) == weights(output / f"checkpoint-{best}")


def test_the_trained_policy_predicts_as_a_run_of_its_own_does(folder: Path, tmp_path: Path) -> None:
    keys = {"val_size": 5, "do_predict": True, "max_steps": 2, "save_strategy": "no"}
    output = train(folder, tmp_path / "out", **keys)
    alone = {"stage": "sft", "do_train": False, "predict_with_generate": True}
    alone |= {"reward_model": ..., "adapter_name_or_path": str(output)}
    train(folder, tmp_path / "alone", **{**keys, **alone})
    found, expected = (
        [json.loads(line) for line in (place / "generated_predictions.jsonl").open()]
        for place in (output, tmp_path / "alone")
    )
    assert len(found) == 5
    assert all(row["label"].startswith("word") for row in found)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in expected]
    assert [row["predict"] for row in found] == [row["predict"] for row in expected]
    assert [row["label"].split() for row in found] == [row["label"].split() for row in expected]
    results = json.loads((output / "all_results.json").read_text())
    assert {"predict_rouge-l", "predict_bleu-4", "predict_exact_match"} <= set(results)


def test_prompts_without_responses_are_predicted_without_scores(
    folder: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": f"Say {i}.", "output": ""} for i in range(12)]
    (folder / "prompts.json").write_text(json.dumps(rows))
    info = folder / "dataset_info.json"
    info.write_text(
        json.dumps(json.loads(info.read_text()) | {"prompts": {"file_name": "prompts.json"}})
    )
    keys = {"val_size": 4, "do_predict": True, "max_steps": 1, "dataset": "prompts"}
    output = train(folder, tmp_path / "out", **keys)
    lines = [json.loads(line) for line in (output / "generated_predictions.jsonl").open()]
    assert [line["label"] for line in lines] == [None] * 4
    results = json.loads((output / "predict_results.json").read_text())
    assert set(results) == {"predict_runtime", "predict_samples_per_second"}


# ---- what is wrong ------------------------------------------------------------------------------


def other_adapter(folder: Path, tmp_path: Path) -> str:
    make_tokenizer(tmp_path / "wide")
    make_model(tmp_path / "wide", hidden_size=64)
    keys = {"model_name_or_path": str(tmp_path / "wide"), "max_steps": 1}
    return str(train(folder, tmp_path / "wide_adapter", **keys))


WRONG: dict[str, tuple[dict[str, Any], type[LlmrayError], str]] = {
    "no such model": ({"reward_model": "@nothing"}, LlmrayError, "nothing"),
    "no head": (
        {"reward_model": "@model", "reward_model_type": "full"},
        LlmrayError,
        r"has no value_head.safetensors.*gives no reward",
    ),
    "no adapter": ({"reward_model": "@model"}, LlmrayError, "adapter"),
    "no function": ({"reward_model": "letter_rewards:nothing"}, ArgumentsError, "nothing"),
    "function that raises": (
        {"reward_model": "letter_rewards:broken"},
        RewardError,
        r"letter_rewards:broken raised KeyError: 'wug'.*Mend the function",
    ),
    "server that is down": (
        {
            "reward_model": "http://127.0.0.1:9/score",
            "reward_model_type": "api",
            "reward_num_retries": 0,
            "reward_timeout_s": 0.2,
        },
        RewardError,
        r"http://127.0.0.1:9/score",
    ),
    "prompts that are too long": ({"cutoff_len": 8, "truncation": "error"}, DataError, "cutoff"),
    "rows without prompts": ({"dataset": "answers"}, DataError, "'instruction'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, folder: Path, tmp_path: Path) -> None:
    keys, error, said = WRONG[name]
    keys = {
        key: str(folder / value[1:]) if str(value).startswith("@") else value
        for key, value in keys.items()
    }
    with pytest.raises(error, match=said):
        train(folder, tmp_path / "out", max_steps=1, **keys)


def test_an_adapter_of_another_model_is_no_reward_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmrayError, match=r"wide_adapter.*(size|shape|fit)"):
        train(folder, tmp_path / "out", reward_model=other_adapter(folder, tmp_path), max_steps=1)


# ---- ranks and processes ------------------------------------------------------------------------


def started(keys: dict[str, Any], place: Path, ranks: int = 1) -> subprocess.Popen[bytes]:
    """`llmray train` as a process, on several ranks by torchrun."""
    place.mkdir()
    (place / "run.json").write_text(json.dumps(keys))
    start = [sys.executable, "-m", "llmray"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(ranks), "-m", "llmray"]
    tests = str(Path(__file__).parent)
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen([*start, "train", str(place / "run.json")], env=environ)


def in_process(keys: dict[str, Any], place: Path, ranks: int = 1) -> None:
    assert started(keys, place, ranks).wait(800) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"max_steps": 40, "ppo_score_norm": True, "rollout_log_steps": 1}
    whole = train(folder, tmp_path / "whole", **keys)
    output = tmp_path / "out"
    process = started(keys_of(folder, output, **keys), tmp_path / "run")
    deadline = time.monotonic() + 600
    while not list(output.glob("checkpoint-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) == -9
    with caplog.at_level("INFO", "llmray"):
        train(folder, output, **keys)
    assert any("resuming from" in message for message in caplog.messages)
    assert weights(output) == weights(whole)
    assert told(output) == told(whole)
    assert (output / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()


def on_ranks(folder: Path, tmp_path: Path, **keys: Any) -> list[list[dict[str, Any]]]:
    """What one rank and two log of the same global batch."""
    keys |= {"save_strategy": "no", **HELD_OUT, "val_size": 5, "max_steps": 3}
    train(folder, tmp_path / "alone", **keys, gradient_accumulation_steps=2)
    pair = keys_of(folder, tmp_path / "pair", **keys, gradient_accumulation_steps=1)
    in_process(pair, tmp_path / "run", ranks=2)
    return [told(tmp_path / name) for name in ("alone", "pair")]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_ranks_learn_what_one_does(estimator: str, folder: Path, tmp_path: Path) -> None:
    """The same prompts, draws and mini-batches of a step, of which there are several.

    Rewards differ within each group: Adam makes whole steps of the rounding where they do not.
    """
    keys = {"ppo_buffer_size": 2, "reward_model": "letter_rewards:length", "learning_rate": 0.002}
    keys |= ESTIMATORS[estimator]
    one, two = on_ranks(folder, tmp_path, **keys)
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert set(first) == set(second)
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    places = [tmp_path / name / "adapter_model.safetensors" for name in ("alone", "pair")]
    learned = [load_file(place) for place in places]
    for name, tensor in learned[0].items():
        torch.testing.assert_close(learned[1][name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_policy_reaches_nine_tenths_of_the_best_score(
    estimator: str, folder: Path, tmp_path: Path
) -> None:
    """All letters an e is worth 1; a random policy has a twentieth of it."""
    keys = {
        **ESTIMATORS[estimator],
        **{"finetuning_type": "full", "learning_rate": 0.003, "lr_scheduler_type": "constant"},
        **{"per_device_train_batch_size": 8, "max_steps": 100, "save_strategy": "no"},
        **{"ppo_init_kl": 0.005, "ppo_kl_control": "fixed", "max_new_tokens": 8},
    }
    log = told(train(folder, tmp_path / "out", **keys))
    scores = [record["score"] for record in log if "score" in record]
    assert scores[0] < 0.3
    assert max(scores) > 0.9


@pytest.mark.slow
def test_a_reward_server_of_its_own(folder: Path, tmp_path: Path, reward_dir: Path) -> None:
    """`llmray reward-server` as a process, and `llmray train` as another."""
    run = {"model_name_or_path": str(reward_dir), "template": "chatml", "use_cpu": True}
    (tmp_path / "server.json").write_text(json.dumps(run))
    command = [sys.executable, "-m", "llmray", "reward-server", str(tmp_path / "server.json")]
    environ = {**os.environ, "API_PORT": "0", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = next(
            word.strip(".,")
            for line in server.stderr
            for word in line.split()
            if word.startswith("http://")
        )
        threading.Thread(target=server.stderr.read, daemon=True).start()
        keys = {"reward_model": address, "reward_model_type": "api", "max_steps": 2}
        in_process(keys_of(folder, tmp_path / "out", **keys), tmp_path / "run")
    finally:
        server.terminate()
        server.wait(600)
    log = [
        record for record in read_log(tmp_path / "out" / "trainer_log.jsonl") if "loss" in record
    ]
    assert [record["current_steps"] for record in log] == [1, 2]
    assert all(record["score"] != 0 for record in log)
