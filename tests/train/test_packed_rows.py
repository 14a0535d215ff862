"""Packed rows train as unpacked ones do: equal log-probabilities, losses, gradients and resumes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import build_model, make_model, make_tokenizer

from llmray import local
from llmray.arguments.loading import load
from llmray.arguments.optimizer import OptimizerArguments
from llmray.batch import Batch
from llmray.data import packing, shards
from llmray.data.batches import Batches
from llmray.data.features import RowFeatures
from llmray.data.packing import PackedTable
from llmray.data.prepared import SampleTable
from llmray.model.attention import why_not_flat
from llmray.model.head import TokenModel
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import LanguageModeling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS
from llmray.train.reading import Ahead, Reader, Rows

CAPACITY = 24
# one that takes flat rows, one with windows, and two that take padded ones only
ARCHITECTURES = {"llama": True, "gemma2": True, "lfm2": False, "falcon_h1": False}


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    """30 rows of 2 to 24 tokens; from a quarter of each on, all is learned."""
    draw = np.random.default_rng(0)
    rows = []
    for length in np.clip(draw.lognormal(1.8, 0.7, 30), 2, CAPACITY).astype(int):
        ids = draw.integers(3, 300, length).astype(np.int32)
        rows.append(RowFeatures(ids, (max(1, length // 4), int(length)), False))
    shards.write(tmp_path / "rows.arrow", rows)
    return SampleTable([str(tmp_path / "rows.arrow")])


def packed(table: SampleTable) -> PackedTable:
    return PackedTable(table, packing.pack(table.lengths, CAPACITY))


def engine(arch: str, is_flat: bool) -> Engine:
    torch.manual_seed(0)
    base = build_model(arch, amplify=3.0)
    assert (why_not_flat(base) is None) == is_flat
    model = TokenModel(base, flat=is_flat)
    trainable = dict(model.named_parameters())
    options = OptimizerArguments(learning_rate=0.01)
    return Engine(
        model,
        trainable,
        optimizers.build(model, trainable, options),
        schedules.schedule(options, 10),
        world=World.single(torch.device("cpu")),
        precision=PRECISIONS["fp32"],
        max_grad_norm=0.0,
    )


def sequences(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of each sample of a batch."""
    if batch.segments is not None:
        parts = batch.input_ids[0].split(batch.segments.lengths_q)
        return [tuple(part.tolist()) for part in parts]
    assert batch.attention_mask is not None
    pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_of_a_bin_do_not_see_each_other(arch: str, table: SampleTable) -> None:
    """Log-probabilities of each row in its bin equal those of the row alone."""
    is_flat = ARCHITECTURES[arch]
    model = engine(arch, is_flat)
    lone: dict[tuple[int, ...], torch.Tensor] = {}
    for row in range(len(table)):
        [batch] = Rows(table, flat=is_flat, pad_id=0).batches(np.array([row]))
        lone[sequences(batch)[0]] = model.logprobs(batch).logprobs
    bins = Rows(packed(table), flat=is_flat, pad_id=0)
    seen = 0
    for number in range(len(bins.table)):
        for batch in bins.batches(np.array([number])):
            found = model.logprobs(batch).logprobs
            for index, ids in enumerate(sequences(batch)):
                ours = found[batch.target_sample == index]
                torch.testing.assert_close(ours, lone[ids], atol=1e-4, rtol=1e-4)
                seen += 1
    assert seen == len(table) > 2 * len(bins.table)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loss_and_gradient_of_a_packed_epoch_equal_the_unpacked(
    arch: str, table: SampleTable
) -> None:
    """One step of all bins, beside one step of all rows, four at a time."""
    is_flat = ARCHITECTURES[arch]
    found = []
    for rows in (table, packed(table)):
        model = engine(arch, is_flat)
        every = Rows(rows, flat=is_flat, pad_id=0)
        parts = np.array_split(np.arange(len(rows)), -(-len(rows) // 4))
        done = model.forward_backward(
            [batch for part in parts for batch in every.batches(part)], LanguageModeling()
        )
        gradient = {name: p.grad for name, p in model.model.named_parameters()}
        found.append((done.loss, done.count, done.num_tokens, gradient))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-5)
    assert found[1][1:3] == found[0][1:3] == (table.target_counts.sum(), table.num_tokens)
    for name, gradient in found[0][3].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][3][name], gradient, atol=1e-5, rtol=1e-3)


def test_padded_rows_of_bins_need_no_more_cells_than_bins(table: SampleTable) -> None:
    bins = packed(table)
    rows = Rows(bins, flat=False, pad_id=0)
    assert rows.splits
    for first in range(0, len(bins) - 1, 2):
        batches = rows.batches(np.array([first, first + 1]))
        assert max(batch.input_ids.numel() for batch in batches) <= 2 * CAPACITY
        tokens = sum(batch.num_tokens for batch in batches)
        assert tokens == bins.lengths[first : first + 2].sum()
    [nothing] = rows.batches(np.empty(0, np.int64))
    assert (nothing.num_samples, nothing.num_tokens) == (0, 0)


def test_ranks_agree_on_the_micro_batches_of_split_bins(table: SampleTable) -> None:
    """Another rank has seven: this one brings as many, the last ones empty."""

    class OtherRank:
        def max(self, values):
            return [7.0]

    bins = packed(table)
    batches = Batches(bins.lengths, 1, 2, 1, 0, seed=0, order="random")
    rows = Rows(bins, flat=False, pad_id=0)
    brought = Reader(rows, batches, Ahead(), world=OtherRank()).step(0)
    counts = [batch.num_samples for batch in brought]
    assert len(counts) == 7
    assert counts[-1] == 0 < counts[0]


# ---- whole runs ------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    rows = [{"instruction": f"Say {i}.", "output": "word " * (i % 9 + 1)} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(tiny_llama_dir),
        "template": "chatml",
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "packing": True,
        "cutoff_len": 256,
        "finetuning_type": "lora",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "fp32": True,
    }


def train(keys: dict, output: Path, **more: object) -> dict[str, bytes]:
    assert local.train(load({**keys, "output_dir": str(output), **more}, environ={})) == 0
    found = load_file(output / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def test_a_packed_run_resumes_in_the_same_order(keys: dict, tmp_path: Path) -> None:
    """To step 3 and on to 7, in the second epoch, beside 7 at once."""
    train(keys, tmp_path / "parts", max_steps=3, lr_scheduler_type="constant")
    parts = train(keys, tmp_path / "parts", max_steps=7, lr_scheduler_type="constant")
    whole = train(keys, tmp_path / "whole", max_steps=7, lr_scheduler_type="constant")
    assert parts == whole


def test_what_packing_came_to_is_said(
    keys: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llmray"):
        train(keys, tmp_path / "out", max_steps=1)
    [line] = [record.message for record in caplog.records if "packed into" in record.message]
    assert line.startswith("data: 40 rows packed into ")
    assert "bins of 256 tokens" in line
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["train_tokens"] > 200  # of several rows, in two bins


def test_rows_of_bins_are_apart_where_the_model_takes_no_flat_rows(
    keys: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; as many tokens are learned as without packing."""
    make_tokenizer(tmp_path / "model")
    model = make_model(tmp_path / "model", "lfm2")
    common = {**keys, "model_name_or_path": str(model), "lora_target": "all", "learning_rate": 0}
    common |= {"save_strategy": "no", "num_train_epochs": 1, "disable_shuffling": True}
    with caplog.at_level(logging.INFO, "llmray"):
        train(common, tmp_path / "packed", per_device_train_batch_size=1)
    said = [record for record in caplog.messages if "the rows of a bin are padded" in record]
    assert len(said) == 1
    train(common, tmp_path / "plain", packing=False, per_device_train_batch_size=4)
    packed, plain = (
        json.loads((tmp_path / name / "train_results.json").read_text())
        for name in ("packed", "plain")
    )
    assert packed["train_tokens"] == plain["train_tokens"]
