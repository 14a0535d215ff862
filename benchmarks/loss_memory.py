"""Peak memory and time of the language-model loss: chunks at the targets, against all logits.

    python benchmarks/loss_memory.py

A decoder of one thin layer stands below a head of SmolLM2's size, so that the head and the loss are
nearly all of the work. Every measurement is a process of its own; variants take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import Report

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ROWS, LENGTH, HIDDEN, VOCABULARY = 4, 1024, 576, 49152
VARIANTS = ("naive", "llmray")


def main() -> None:
    """Measure, or (in a child) be what is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.7, help="of tokens that are targets")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--trainable", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.share, options.trainable)))
        return
    compare(options).publish(options.json)


def compare(options: argparse.Namespace) -> Report:
    """Medians of both variants, for a frozen head (LoRA) and one that trains (full)."""
    report = Report(
        f"The loss of {ROWS} x {LENGTH} tokens, {VOCABULARY} classes, fp32, forward and backward",
        ["head", "variant", "seconds", "peak MiB", "loss"],
    )
    for head, flags in (("frozen", []), ("trainable", ["--trainable"])):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        for _ in range(options.pairs):
            for name in VARIANTS:
                words = [sys.executable, __file__, "--child", name, "--share", str(options.share)]
                done = subprocess.run([*words, *flags], capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        middle = {
            name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            for name, runs in found.items()
        }
        for name, values in middle.items():
            seconds, peak, loss = values["seconds"], values["peak_mib"], values["loss"]
            report.rows.append([head, name, f"{seconds:.2f}", f"{peak:.0f}", f"{loss:.6f}"])
        memory = middle["llmray"]["peak_mib"] / middle["naive"]["peak_mib"]
        duration = middle["llmray"]["seconds"] / middle["naive"]["seconds"]
        report.facts.append(f"{head} head: {memory:.0%} of the memory, {duration:.0%} of the time.")
        if memory > 0.25 or duration > 1:
            report.failures.append(f"{head} head: more than a quarter of the memory, or slower")
        report.details[head] = found
    return report


def measure(variant: str, share: float, is_trainable: bool) -> dict[str, float]:
    """Seconds of the faster of two rounds, and the rise of resident memory in them."""
    import torch

    model, ids, is_target = build(share, is_trainable)
    loss_of = naive if variant == "naive" else chunked
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, seconds = resident("VmRSS"), []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        loss = loss_of(model, ids, is_target)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    gradient = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 / 2**20
    assert torch.isfinite(loss)
    return {
        "seconds": min(seconds),
        "peak_mib": resident("VmHWM") - before - gradient,
        "loss": loss.item(),
    }


def build(share: float, is_trainable: bool) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The model, token ids (ROWS, LENGTH) and which of them are targets."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(is_trainable)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    is_target = torch.rand(ROWS, LENGTH) < share
    is_target[:, 0] = False
    return model, ids, is_target


def naive(model: PreTrainedModel, ids: Tensor, is_target: Tensor) -> Tensor:
    """The logits of all positions and torch's cross entropy."""
    import torch.nn.functional as F

    labels = ids.masked_fill(~is_target, -100)[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1))


def chunked(model: PreTrainedModel, ids: Tensor, is_target: Tensor) -> Tensor:
    """The project's way: a flat row, log-probabilities at the targets alone."""
    from llmray.data.collate import collate
    from llmray.data.prepared import Sample
    from llmray.model.head import TokenModel

    samples: list[Any] = [
        Sample(row.int().numpy(), mask.numpy()) for row, mask in zip(ids, is_target, strict=True)
    ]
    batch = collate(samples, flat=True, pad_id=0)
    return -TokenModel(model, flat=True)(batch).logprobs.mean()


def resident(name: str) -> float:
    """A line of /proc/self/status in MiB: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {name}: this benchmark needs Linux")


if __name__ == "__main__":
    main()
