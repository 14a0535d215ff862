"""Stages dpo and kto end to end on a tiny model: first losses, references, resume, evaluation."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_site import FIRST, LOSSES, Site, make_site
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from llmray.errors import ArgumentsError, CheckpointError
from llmray.train import reference
from llmray.train.feed import open_feed
from llmray.train.observers import read_log


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = make_site(tmp_path_factory.mktemp("preference"))
    made.run(stage="dpo", max_steps=3, learning_rate=0.05)[0].rename(made.root / "adapter")
    return made


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_fall_and_margins_rise(site: Site, loss: str) -> None:
    log = site.log(pref_loss=loss, max_steps=12)
    if loss in FIRST:
        assert log[0]["loss"] == pytest.approx(FIRST[loss], abs=1e-5)
        assert log[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert log[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert ("kl" in log[0]) == (loss not in ("orpo", "simpo"))
    assert log[-1]["rewards/accuracies"] >= 0.75


def test_kto_learns_what_is_wanted(site: Site) -> None:
    log = site.log(stage="kto", max_steps=20, learning_rate=0.02, pref_beta=0.5)
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert log[-1]["loss"] < 0.45
    last = [record["rewards/margins"] for record in log[-4:] if "rewards/margins" in record]
    assert min(last) > 0


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning_type": "full", "learning_rate": 0.001},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"adapter_name_or_path": "@adapter"},
        {"adapter_name_or_path": "@adapter", "create_new_adapter": True},
        {"pissa_init": True, "lora_target": "q_proj,v_proj"},
        {"lora_dropout": 0.2},
        {"use_dora": True},
        {"model_name_or_path": "@wide", "quantization_bit": 4},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())).replace("@", ""),
)
def test_the_reference_is_the_policy_as_it_was(site: Site, keys: dict[str, Any]) -> None:
    """Without dropout the first loss is ln 2, later ones not; also on the way, as rows come."""
    keys = {
        k: str(site.root / v[1:]) if isinstance(v, str) and v[0] == "@" else v
        for k, v in keys.items()
    }
    logs = [site.log(precompute_ref_logps=wish, **keys) for wish in (False, True)]
    for log in logs:
        if not keys.get("lora_dropout"):
            assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert abs(log[-1]["rewards/margins"]) > 1e-3
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=2e-4)


def test_a_reference_whose_base_is_yet_to_be_rounded_anew_is_asked_as_rows_come(
    site: Site,
) -> None:
    """PiSSA beside low bits: asked beforehand, it would be the model before the decomposition."""
    keys: dict[str, Any] = {
        "model_name_or_path": str(site.root / "wide"),
        "quantization_bit": 4,
        "pissa_init": True,
    }
    training = site.assemble(**keys, num_train_epochs=2, max_steps=-1)
    engine = training.core.engine
    assert engine.reference is not None
    batch = training.train.step(0)[0]
    beforehand = engine.reference_logprobs(batch)
    log = site.log(**keys)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(log[-1]["rewards/margins"]) > 1e-3
    engine.forward_backward([batch], training.core.objective)
    started = engine.reference_logprobs(batch)
    assert (started - beforehand).abs().max() > 1e-3
    engine.optim_step()
    assert torch.equal(engine.reference_logprobs(batch), started)
    with pytest.raises(ArgumentsError, match="would be another"):
        site.arguments(**keys, precompute_ref_logps=True)


def test_the_reference_is_frozen_and_the_policy_untouched_by_it(site: Site) -> None:
    """Its answers are the same after training, and asking it changes nothing that trains."""
    for keys in ({}, {"finetuning_type": "full"}, {"pissa_init": True, "lora_target": "q_proj"}):
        training = site.assemble(precompute_ref_logps=False, learning_rate=0.05, **keys)
        engine = training.core.engine
        batch = training.train.step(0)[0]
        before = engine.reference_logprobs(batch)
        for step in range(3):
            engine.forward_backward(training.train.step(step), training.core.objective)
            engine.optim_step()
        weights = {k: v.clone() for k, v in engine.state_dict()["trainable"].items()}
        after, policy = engine.reference_logprobs(batch), engine.logprobs(batch).logprobs
        torch.testing.assert_close(after, before, atol=2e-5, rtol=0)
        assert (policy - before).abs().max() > 1e-2
        for name, tensor in engine.state_dict()["trainable"].items():
            assert torch.equal(tensor, weights[name])
        assert all(p.requires_grad for p in engine._trainable.values())


def test_a_model_of_its_own_is_the_reference(site: Site) -> None:
    other = str(site.root / "other")
    log = site.log(ref_model=other, precompute_ref_logps=False)
    assert abs(log[0]["loss"] - math.log(2)) > 1e-2
    known = site.log(ref_model=other, precompute_ref_logps=True)
    assert known[0]["loss"] == pytest.approx(log[0]["loss"], abs=1e-4)
    with_adapter = site.log(ref_model_adapters=str(site.root / "adapter"))
    assert abs(with_adapter[0]["loss"] - log[0]["loss"]) > 1e-3
    training = site.assemble(ref_model=other, precompute_ref_logps=True)
    assert training.core.engine.reference is None  # its memory is given back


def test_losses_without_a_reference_load_none(site: Site) -> None:
    for loss in ("orpo", "simpo"):
        assert site.assemble(pref_loss=loss).core.engine.reference is None


def test_the_reference_is_asked_once_and_then_known(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    plain = reference.logps

    def counted(engine: Any, rows: Any, *more: Any) -> np.ndarray:
        asked.append(len(rows.table))
        return plain(engine, rows, *more)

    monkeypatch.setattr(reference, "logps", counted)
    keys: dict[str, Any] = {"val_size": 3, "seed": 5, "num_train_epochs": 2, "max_steps": -1}
    training = site.assemble(**keys)
    assert asked == [11, 3]
    reader = training.train
    assert reader.step(0)[0].reference is not None
    assert training.core.evals["eval"].reference is not None
    site.assemble(**keys)
    assert asked == [11, 3]
    # one epoch alone: what is known is used all the same, what is not is asked as rows come
    site.assemble(**keys | {"num_train_epochs": 1})
    assert asked == [11, 3]
    fresh = site.assemble(**keys | {"num_train_epochs": 1, "val_size": 4})
    assert asked == [11, 3]
    assert fresh.core.engine.reference is not None
    with caplog.at_level(logging.INFO, "llmray"):
        site.assemble(**keys, adapter_name_or_path=str(site.root / "adapter"))
    assert asked == [11, 3, 11, 3]
    with pytest.raises(ArgumentsError, match="precompute_ref_logps"):
        site.arguments(precompute_ref_logps=True, streaming=True)


@pytest.mark.parametrize(
    "keys",
    [
        {"precompute_ref_logps": False},
        {"finetuning_type": "full", "precompute_ref_logps": False, "learning_rate": 0.001},
        {"pref_bco_weight": 1.0, "pref_loss": "kto_pair"},
        {"stage": "kto"},
        {"stage": "kto", "precompute_ref_logps": False, "adapter_name_or_path": "@adapter"},
        {"stage": "kto", "streaming": True, "val_size": 3, "do_eval": True},
    ],
    ids=["adapter off", "copy", "statistics", "kto", "kto on an adapter", "kto of a stream"],
)
def test_a_resumed_run_equals_the_undisturbed_one(site: Site, keys: dict[str, Any]) -> None:
    keys = {**keys, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3}
    if "adapter_name_or_path" in keys:
        keys["adapter_name_or_path"] = str(site.root / "adapter")
    whole, _ = site.run(**keys)
    again = whole.with_name(whole.name + "-again")
    again.mkdir()
    (whole / "checkpoint-3").rename(again / "checkpoint-3")
    resumed, _ = site.run(**keys, output_dir=str(again), resume_from_checkpoint=True)
    name = "model.safetensors" if "finetuning_type" in keys else "adapter_model.safetensors"
    ours, theirs = load_file(whole / name), load_file(resumed / name)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_evaluations_have_the_metrics_and_do_not_depend_on_batches(site: Site) -> None:
    for stage in ("dpo", "kto"):
        keys: dict[str, Any] = {"stage": stage, "val_size": 5, "eval_strategy": "steps"}
        keys |= {"eval_steps": 3, "pref_beta": 0.3}
        if stage == "dpo":
            keys["pref_loss"] = "kto_pair"
        found = []
        for size in (1, 4):
            log = site.log(**keys, per_device_eval_batch_size=size)
            found.append([r for r in log if "eval_loss" in r][-1])
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "kl"):
            assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], abs=1e-4)


def test_the_best_is_chosen_by_a_metric_of_pairs(site: Site) -> None:
    output, result = site.run(
        val_size=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        plot_loss="loss,rewards/margins",
    )
    log = [r for r in read_log(output / "trainer_log.jsonl") if "eval_rewards/margins" in r]
    best = max(record["eval_rewards/margins"] for record in log)
    assert result.metrics["eval_rewards/margins"] == pytest.approx(best)
    assert any("margins" in path.name for path in output.glob("*.png"))


def test_evaluation_alone_compares_with_the_model_without_its_adapter(site: Site) -> None:
    output, trained = site.run(val_size=5, do_eval=True, eval_strategy="no", max_steps=8)
    keys: dict[str, Any] = {"val_size": 5, "do_train": False, "do_eval": True}
    _, alone = site.run(**keys, adapter_name_or_path=str(output))
    for name in ("eval_loss", "eval_rewards/margins", "eval_kl"):
        assert alone.metrics[name] == pytest.approx(trained.metrics[name], abs=1e-4)
    with pytest.raises(ArgumentsError, match="Write ref_model"):
        site.run(**keys)


def test_weights_that_differ_too_much_are_said(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """8 of each kind; with weight 3 the ratio is 3."""
    with caplog.at_level(logging.WARNING, "llmray"):
        site.assemble(stage="kto")
        assert "kto:" not in caplog.text
        site.assemble(stage="kto", kto_chosen_weight=3.0)
    assert "8 wanted answers with weight 3 against 8 unwanted" in caplog.text
    assert "a ratio of 3;" in caplog.text
    assert "kto_chosen_weight between 1 and 1.33" in caplog.text


def test_padded_models_learn_from_two_rows_a_pair(tmp_path: Path, site: Site) -> None:
    make_tokenizer(tmp_path / "hybrid")
    make_model(tmp_path / "hybrid", "lfm2")
    log = site.log(model_name_or_path=str(tmp_path / "hybrid"), max_steps=3)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    # a reference that takes no flat rows: the policy gets none either
    mixed = site.assemble(ref_model=str(tmp_path / "hybrid"), precompute_ref_logps=False)
    assert not mixed.core.engine.model.flat


def test_other_identities_are_refused(site: Site) -> None:
    """A run goes on against the reference that it began with, or not at all."""
    first, _ = site.run(save_strategy="steps", save_steps=3, max_steps=3)
    again = {"save_strategy": "steps", "output_dir": str(first), "resume_from_checkpoint": True}
    with pytest.raises(CheckpointError, match="reference"):
        site.run(**again, max_steps=6, ref_model=str(site.root / "other"))


@pytest.mark.parametrize("arch", ["llama", "lfm2"])
@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
def test_packed_rows_give_the_losses_of_rows_apart(
    site: Site, tmp_path: Path, stage: str, arch: str
) -> None:
    """A step takes all rows, or all bins; the second model pads the rows of its bins."""
    model = site.root / "model"
    if arch != "llama":
        model = tmp_path / arch
        make_tokenizer(model)
        make_model(model, arch)
    keys: dict[str, Any] = {"stage": stage, "model_name_or_path": str(model), "max_steps": 3}
    keys |= {"per_device_train_batch_size": 40, "disable_shuffling": True, "cutoff_len": 128}
    more: list[dict[str, Any]] = [{}]
    if stage == "dpo":
        keys["pref_loss"] = "kto_pair"  # reads something of the whole step
        more = [{"precompute_ref_logps": False}, {"precompute_ref_logps": True}]
    for one in more:
        plain, packed = (site.log(**keys, **one, packing=packs) for packs in (False, True))
        assert len(plain) == len(packed) == 3
        for ours, theirs in zip(packed, plain, strict=True):
            names = {name for name in theirs if name == "loss" or "/" in name or "margin" in name}
            names.discard("rewards/accuracies")  # at first pairs are even but for rounding
            assert len(names) > 1
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    table = site.assemble(**keys, packing=True, fp32=True).train.rows.table
    assert 1 < len(table) < table.num_rows


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_steps_with_fewer_rows_than_micro_batches_know_their_reference(
    site: Site, stage: str
) -> None:
    """14 pairs, 16 answers: of the second step's micro-batches the last have no row."""
    keys = {"stage": stage, "per_device_train_batch_size": 4 if stage == "dpo" else 5}
    keys |= {"gradient_accumulation_steps": 3, "max_steps": 2, "disable_shuffling": True}
    logs = [site.log(**keys, precompute_ref_logps=wish) for wish in (True, False)]
    for known, asked in zip(*logs, strict=True):
        assert known["loss"] == pytest.approx(asked["loss"], abs=1e-5)


def test_the_longest_row_of_a_stream_of_pairs_holds_both_answers(site: Site) -> None:
    """By it memory is estimated, since the lengths of a stream are not known."""
    for stage, longest in (("dpo", 192), ("rm", 192), ("kto", 96)):
        arguments = site.arguments(stage=stage, streaming=True)
        context = site.context(arguments)
        feed = open_feed(arguments, context.prepared, context.model_dir, context.world)
        assert feed.lengths.tolist() == [longest] * 4
