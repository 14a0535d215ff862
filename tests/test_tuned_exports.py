"""Each way to tune on the real model: ten steps from a file, export, reload, the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_configs import ROOT, real_model
from transformers import AutoModelForCausalLM

from llmray import hub
from llmray.arguments.model import ModelArguments

__all__ = ["real_model"]  # a fixture

CONFIGS = ["sft_lora", "sft_qlora", "sft_dora", "sft_pissa", "sft_freeze", "sft_full"]


def command(words: list[str], folder: Path, cache: Path) -> None:
    environ = {**os.environ, "LLMRAY_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "llmray", *words],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(100, 4900, 300)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CONFIGS)
def test_ten_steps_export_and_reload(
    name: str, real_model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported is what was trained; peft and transformers alone load the latter."""
    given, cache = real_model
    config = str(ROOT / "configs" / f"{name}.yaml")
    keys = [
        f"model_name_or_path={given}",
        f"dataset_dir={ROOT / 'data'}",
        f"output_dir={tmp_path / 'out'}",
    ]
    short = ["max_steps=10", "max_samples=40", "cutoff_len=64", "per_device_train_batch_size=2"]
    short += ["gradient_accumulation_steps=1", "save_strategy=no", "eval_strategy=no", "fp32=true"]
    command(["train", config, *keys, *short, "val_size=0"], tmp_path, cache)
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert 0 < results["train_loss"] < 12

    monkeypatch.setenv("LLMRAY_CACHE", str(cache))
    base = hub.resolve(given, ModelArguments())
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    out = tmp_path / "out"
    if (out / "adapter_config.json").is_file():
        from peft import PeftModel

        trained = logits(PeftModel.from_pretrained(plain, out))
        source = [f"model_name_or_path={given}", f"adapter_name_or_path={out}"]
    else:
        trained = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
        source = [f"model_name_or_path={out}"]
    assert (trained - before).abs().max() > 1e-3
    exported = tmp_path / "exported"
    words = [*source, f"export_dir={exported}", "template=smollm2", "infer_dtype=float32"]
    command(["export", *words], tmp_path, cache)
    again = logits(AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32))
    torch.testing.assert_close(again, trained, atol=2e-3, rtol=1e-3)
