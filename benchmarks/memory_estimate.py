"""The memory estimate beside what a training step really holds, over many runs.

    python benchmarks/memory_estimate.py

Each run is a process of its own: it loads a random model, makes two steps while a thread watches
its anonymous memory, and a third under torch's profiler, whose memory events give the peak of live
tensors. Model, head, engine and optimizer are those of `llmray train`. Blocks above 1 MiB go back
to the system when they are freed (MALLOC_MMAP_THRESHOLD_): a process would else hold what glibc
keeps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from report import Report

LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16384,
    },
    "medium": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32768,
    },
    "large": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 64, **SIZES["medium"]},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 64, **SIZES["medium"]},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 704,
        **SIZES["medium"],
    },
}
MODELS = {
    **{name: {**LLAMA, **sizes} for name, sizes in SIZES.items()},
    **OTHERS,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "lora": {"finetuning_type": "lora"},
    "qlora": {"finetuning_type": "lora", "quantization_bit": 4},
}
COLUMNS = ("model", "length", "method", "recomputed", "dtype")
COLUMNS += ("tensors, estimated", "measured", "", "process, estimated", "measured", "")
COLUMNS += ("loaded / size",)
ROWS = 2  # in a micro-batch


def main() -> None:
    """Measure all cases, or (in a child) be what is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**options.child)))
        return
    compare(options).publish(options.json)


def cases() -> list[dict[str, Any]]:
    """Sizes, lengths and methods, with and without recomputation; other architectures, formats."""
    lengths = {"small": (256, 1024), "medium": (256,), "large": (256,)}
    found = [
        {"model": model, "length": length, "method": method, "recomputes": recomputes}
        for model in SIZES
        for length, method, recomputes in itertools.product(lengths[model], METHODS, (False, True))
    ]
    found += [
        {"model": model, "length": 256, "method": method, "recomputes": False}
        for model, method in itertools.product(OTHERS, ("full", "lora"))
    ]
    found += [
        {"model": "small", "length": 256, "method": method, "recomputes": False, "dtype": dtype}
        for dtype, method in itertools.product(("bf16", "pure_bf16"), ("full", "lora"))
    ]
    return found


def compare(options: argparse.Namespace) -> Report:
    """Estimates beside figures, worst first in the facts."""
    report = Report(
        f"Peak of a step of {ROWS} rows in MB: live tensors, and anonymous memory of the process",
        COLUMNS,
    )
    worst = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as root:
        for case in cases():
            case = {"dtype": "fp32", **case}
            if options.only not in "-".join(map(str, case.values())):
                continue
            place = Path(root) / case["model"]
            if not place.exists():
                run(["--child", json.dumps({"make": case["model"], "place": str(place)})])
            found = run(["--child", json.dumps({**case, "place": str(place)})])
            report.details["-".join(map(str, case.values()))] = found
            off = [found["peak"] / found["tensors"] - 1, found["resident"] / found["process"] - 1]
            worst = [max(w, abs(o)) for w, o in zip(worst, off, strict=True)]
            cells = [case["model"], case["length"], case["method"]]
            cells += ["yes" if case["recomputes"] else "no", case["dtype"]]
            cells += [f"{found[name] / 1e6:.0f}" for name in ("peak", "tensors")]
            cells += [f"{off[0]:+.0%}"]
            cells += [f"{found[name] / 1e6:.0f}" for name in ("resident", "process")]
            cells += [f"{off[1]:+.0%}"]
            report.rows.append([*cells, f"{found['loaded']:.2f}"])
            print(report.rows[-1], file=sys.stderr, flush=True)
            if abs(off[0]) > 0.15 or abs(off[1]) > 0.25 or found["loaded"] > 1.15:
                report.failures.append(f"{'-'.join(map(str, case.values()))}: {off}")
    report.facts.append(f"Largest difference: tensors {worst[0]:.0%}, process {worst[1]:.0%}.")
    return report


def run(words: list[str]) -> dict[str, Any]:
    """What a child prints."""
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, env=settings
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(
    place: str,
    model: str = "",
    length: int = 0,
    method: str = "",
    recomputes: bool = False,
    dtype: str = "fp32",
    make: str = "",
) -> dict[str, float]:
    """Write a model, or train on it: bytes estimated, of live tensors, of the process."""
    if make:
        build(make, Path(place))
        return {}
    from llmray import assembly
    from llmray.model import memory
    from llmray.train import optimizers, precision
    from llmray.train.engine import Engine
    from llmray.train.schedules import ByStep
    from llmray.train.stages import STAGES

    arguments = settings(place, METHODS[method], recomputes, dtype)
    context, batch = surroundings(place), rows(length)
    numbers = precision.choose(arguments, context.world.device)
    warm(arguments)
    watch = Watch()
    token_model = assembly._token_model(arguments, context, numbers, flat=True)
    loaded = watch.highest
    trainable = {n: p for n, p in token_model.named_parameters() if p.requires_grad}
    optimizer = optimizers.build(token_model, trainable, arguments.optimizer)
    engine = Engine(
        token_model,
        trainable,
        optimizer,
        ByStep(lambda step: 1.0),
        world=context.world,
        precision=numbers,
        max_grad_norm=1.0,
    )
    objective = STAGES["sft"].objective(arguments)

    def step() -> None:
        engine.forward_backward([batch], objective)
        engine.optim_step()

    step()
    step()
    process = watch.stop()
    states = [v for state in optimizer.state.values() for v in state.values()]
    weights = standing([*token_model.parameters(), *token_model.buffers()])
    live = weights + standing(states)
    found = memory.estimate_for(
        arguments, Path(place), [length] * ROWS, dtype, recomputes=recomputes
    )
    return {
        "peak": found.peak,
        "resident": found.resident,
        "tensors": live + rise(step),
        "process": process,
        "loaded": loaded / weights,
        "live": live,
        "mapped": found.mapped,
        "weights": weights,
        **{f"phase {name}": value for name, value in found.phases.items()},
    }


def build(name: str, place: Path) -> None:
    """Write a random model in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(MODELS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, max_position_embeddings=4096)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)


def settings(place: str, keys: dict[str, Any], recomputes: bool, dtype: str) -> Any:
    """The arguments of a run that would do these steps."""
    from llmray.arguments.loading import load

    return load(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": place,
            "dataset": "none",
            "output_dir": "none",
            "template": "chatml",
            "per_device_train_batch_size": ROWS,
            "disable_gradient_checkpointing": not recomputes,
            dtype: True,
            **keys,
        },
        environ={},
    )


def surroundings(place: str) -> Any:
    """What a run is given from outside; one process on the CPU."""
    import torch

    from llmray import assembly
    from llmray.train.parallel import World

    world = World.single(torch.device("cpu"))
    return assembly.Context(world, "", None, Path(place), lambda: None)  # type: ignore[arg-type]


def rows(length: int) -> Any:
    """A micro-batch of rows of one length, all of their tokens learned."""
    import numpy as np

    from llmray.data.collate import collate
    from llmray.data.prepared import Sample

    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 16000, length, dtype=np.int32) for _ in range(ROWS)]
    return collate([Sample(i, np.ones(length, bool)) for i in ids], flat=True, pad_id=0)


def warm(arguments: Any) -> None:
    """Import all that the run will, and let libraries take what they take at first use."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    if arguments.model.is_quantized:
        import bitsandbytes

        bitsandbytes.nn.Linear4bit(64, 64).to("cpu")(torch.ones(1, 64))
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        (matrix @ matrix).sum().backward()


class Watch:
    """The growth of this process's anonymous memory and its peak, watched by a thread."""

    def __init__(self) -> None:
        self._start = anonymous()
        self.highest = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The highest growth in bytes."""
        self._is_over.set()
        self._thread.join()
        return self.highest

    def _look(self) -> None:
        while not self._is_over.is_set():
            self.highest = max(self.highest, anonymous() - self._start)
            time.sleep(0.002)


def anonymous() -> int:
    """Anonymous resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


def standing(values: list[Any]) -> int:
    """Bytes of the storages of tensors, each once."""
    import torch

    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in values
        if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())


def rise(step: Any) -> int:
    """The highest sum of what the step allocates less what it frees, by the profiler's events."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler saw no memory"
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


if __name__ == "__main__":
    main()
