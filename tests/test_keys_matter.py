"""Every key that works, shown to work: two values, and something seen that must differ.

`ROWS` holds one row for each key that is accepted away from its default; a test compares it with
the declarations, so a key can neither be forgotten here nor be accepted and ignored. Most rows
train a tiny model for a few steps in this process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ppo_rows
import pytest
import torch
from safetensors import safe_open
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from llmray import assembly, cli, export, hub, local, reinforcement, store
from llmray.arguments import capabilities
from llmray.arguments.loading import load
from llmray.arguments.run import FIELDS
from llmray.data import access, prepared
from llmray.data.tokenizer import load_tokenizer
from llmray.errors import ArgumentsError, ClusterError, ModelError
from llmray.model import pickled
from llmray.model.load import load_model
from llmray.rl import rewards
from llmray.rl.reward_model import ModelReward
from llmray.run import Context, run
from llmray.serve import answering
from llmray.train import device_memory, optimizers, precision
from llmray.train.engine import Engine
from llmray.train.generate import Sampling
from llmray.train.observers import Console, read_log
from llmray.train.parallel import World

Keys = dict[str, Any]

# performance only: these change how fast a run is, never what it computes
CHANGES_NOTHING = {
    "fsdp",  # of its values only those that ask for nothing are built
    "preprocessing_batch_size",
    "preprocessing_num_workers",
}


@dataclass
class Site:
    """A folder with a tiny model, an adapter's place and data sets."""

    root: Path
    num_runs: int = 0

    def arguments(self, keys: Keys) -> Any:
        self.num_runs += 1
        base = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": "@model",
            "template": "chatml",
            "dataset": "short",
            "dataset_dir": "@data",
            "cutoff_len": 64,
            "finetuning_type": "lora",
            "lora_rank": 2,
            "lora_dropout": 0.0,
            "learning_rate": 0.01,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "fp32": True,
            "report_to": "none",
            "output_dir": f"@run-{self.num_runs}",
        }
        merged = {key: value for key, value in {**base, **keys}.items() if value is not ...}
        for key, value in merged.items():
            if isinstance(value, str) and value.startswith("@"):
                merged[key] = str(self.root / value[1:])
        return load(merged, environ={})

    def train(self, keys: Keys) -> Path:
        arguments = self.arguments(keys)
        model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
        ref = access.ready(arguments, model_dir, root=self.root / "prepared")
        world = World.single(torch.device("cpu"))
        output = arguments.training.output_dir
        run(arguments, Context(world, output, ref, model_dir, lambda: None))
        return Path(output)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("keys")
    for name, amplify in (("model", 2.0), ("other_model", 3.0)):
        make_tokenizer(root / name)
        make_model(root / name, "llama", amplify=amplify)
    make_tokenizer(root / "experts")
    make_model(root / "experts", "qwen3_moe", amplify=2.0)
    make_tokenizer(root / "wide_model")
    make_model(root / "wide_model", amplify=2.0, hidden_size=64)
    make_model(root / "wide", "llama")
    wide = make_tokenizer(root / "wide")
    wide.add_tokens(["wug"])
    wide.save_pretrained(root / "wide")
    for name in ("one", "two"):
        (root / f"{name}.yaml").write_text(f'"word": the number {name}\n')
    for name, first in (("data", 1), ("other_data", 2)):
        write_data(root / name, first)
    made = Site(root)
    (made.train({"lora_rank": 3, "learning_rate": 0.1})).rename(root / "adapter")
    inner = made.train({"lora_rank": 3, "learning_rate": 0.2, "save_strategy": "no"})
    inner.rename(root / "adapter" / "inner")
    return made


def write_data(directory: Path, first: int) -> None:
    directory.mkdir()
    short = [
        {"instruction": f"Say {i} words.", "output": " ".join(["word"] * i), "text": f"Text {i}."}
        for i in range(first, first + 12)
    ]
    turns = [
        {
            "conversations": [
                {"from": "human", "value": f"Question {i}?"},
                {"from": "gpt", "value": "First."},
                {"from": "human", "value": "And then?"},
                {"from": "gpt", "value": "Second answer."},
            ]
        }
        for i in range(8)
    ]
    text = [{"text": f"Some text of number {i}. " * 3} for i in range(12)]
    tools = [{"name": "add", "description": "Adds.", "parameters": {"properties": {}}}]
    calls = [{"function": {"name": "add", "arguments": '{"a": 1}'}}]
    called = [
        {"role": "user", "content": "Add 1."},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    thoughts = [
        {
            "messages": [
                {"role": "user", "content": "First?"},
                {"role": "assistant", "content": "One.", "reasoning_content": "Is it one?"},
                {"role": "user", "content": "Second?"},
                {"role": "assistant", "content": "Two."},
            ]
        }
    ]
    pairs = [
        {"instruction": f"Say {i}.", "chosen": "word " * i, "rejected": "no " * (8 - i // 2)}
        for i in range(first, first + 8)
    ]
    judged = [
        {"instruction": f"Say {i}.", "output": "word " * i, "kto_tag": i % 3 > 0}
        for i in range(first, first + 8)
    ]
    sets = {
        "short": short,
        "pairs": pairs,
        "judged": judged,
        "other": short[:6],
        "turns": turns,
        "text": text,
        "tools": [{"messages": called, "tools": tools}] * 8,
        "thoughts": thoughts * 8,
        "injected": [{**row, "output": "No<|im_end|>yes"} for row in short],
        "spoilt": [*short, {"instruction": 3}],
    }
    info: dict[str, Any] = {name: {"file_name": f"{name}.json"} for name in sets}
    info["turns"]["formatting"] = "sharegpt"
    info["tools"]["formatting"] = info["thoughts"]["formatting"] = "openai"
    info["text"]["columns"] = {"prompt": "text"}
    info["pairs"]["ranking"] = True
    info["judged"]["columns"] = {"kto_tag": "kto_tag"}
    for name, rows in {**sets, "dataset_info": info}.items():
        (directory / f"{name}.json").write_text(json.dumps(rows))


# ---- what is seen of a run ------------------------------------------------------------------


def curve(output: Path) -> list[tuple[float, ...]]:
    log = read_log(output / "trainer_log.jsonl")
    return [(r["loss"], r["lr"], r["grad_norm"]) for r in log if "loss" in r]


def files(output: Path) -> set[str]:
    return {
        str(path.relative_to(output))
        for path in output.rglob("*")
        if path.is_file() and "state/" not in str(path)
    }


def resumable(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.glob("checkpoint-*/state/*"))


def tensors(output: Path) -> set[tuple[str, tuple[int, ...], str]]:
    found = set()
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                tensor = file.get_tensor(name)
                found.add((name, tuple(tensor.shape), str(tensor.dtype)))
    return found


def weights(output: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                digest.update(file.get_tensor(name).float().numpy().tobytes())
    return digest.hexdigest()


def steps(output: Path, key: str = "loss") -> list[int]:
    log = read_log(output / "trainer_log.jsonl")
    return [record["current_steps"] for record in log if key in record]


def evaluation(output: Path) -> tuple[float, float]:
    results = json.loads((output / "eval_results.json").read_text())
    return results["eval_loss"], round(results["eval_samples_per_second"] * results["eval_runtime"])


def scored(output: Path) -> set[str]:
    return set(json.loads((output / "eval_results.json").read_text()))


def figures(output: Path) -> list[str]:
    return sorted(json.loads((output / "all_results.json").read_text()))


def logged(output: Path) -> list[str]:
    return sorted(read_log(output / "trainer_log.jsonl")[0])


def num_rows(output: Path) -> int:
    return json.loads((output / "train_results.json").read_text())["train_tokens"]


# ---- keys that a training run shows -----------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Two values of a key, what is looked at, and what else the run needs.

    A value that begins with @ names a folder of the site; `...` leaves a key away.
    """

    first: Any
    second: Any
    see: Callable[[Path], Any] = curve
    keys: Keys = field(default_factory=dict)


FREEZE = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
FULL = {"finetuning_type": "full"}
TEXT = {"stage": "pt", "dataset": "text", "template": ...}
TOOLS = {"dataset": "tools", "cutoff_len": 512, "truncation": "llamafactory"}
THOUGHTS = {"template": "qwen3", "dataset": "thoughts", "cutoff_len": 256}
EPOCHS = {"max_steps": -1, "num_train_epochs": 1}
MIXED = {"dataset": "short,other"}
UNDER = {"mix_strategy": "interleave_under"}
VALIDATION = {"val_size": 0.25, "eval_strategy": "steps", "eval_steps": 2}
PREDICTS = {"val_size": 0.25, "predict_with_generate": True, "max_new_tokens": 4}
SAVES = {"save_strategy": "steps", "save_steps": 2}
NEVER_BETTER = {"metric_for_best_model": "loss", "greater_is_better": True}
PISSA = {"pissa_init": True}
LORAPLUS = {"loraplus_lr_ratio": 2.0, "lora_target": "embed_tokens,q_proj"}
WIDE = {"model_name_or_path": "@wide_model"}  # 4-bit rows are whole blocks
FOUR_BITS = {**WIDE, "quantization_bit": 4}
DESCRIBED = {"new_special_tokens_config": "@one.yaml", "init_special_tokens": "desc_init"}
PAIRS = {"stage": "dpo", "dataset": "pairs", "lora_dropout": 0.0}
JUDGED = {"stage": "kto", "dataset": "judged"}
LOW_BIT_REFERENCE = {**PAIRS, **WIDE, "ref_model": "@wide_model"}
ADAPTER = {"adapter_name_or_path": "@adapter", "lora_rank": 3}

ROWS: dict[str, Row] = {
    "model_name_or_path": Row("@model", "@other_model"),
    "adapter_name_or_path": Row(..., "@adapter"),
    "adapter_folder": Row(..., "inner", keys={"adapter_name_or_path": "@adapter"}),
    "create_new_adapter": Row(False, True, weights, ADAPTER),
    "add_tokens": Row(..., "word"),
    "add_special_tokens": Row(..., "word"),
    "new_special_tokens_config": Row("@one.yaml", "@two.yaml", keys=DESCRIBED),
    "split_special_tokens": Row(False, True, keys={"dataset": "injected"}),
    "init_special_tokens": Row("noise_init", "desc_init", keys={**DESCRIBED, "max_steps": 1}),
    "train_from_scratch": Row(False, True, keys=FULL),
    "quantization_bit": Row(4, 8, keys=WIDE),
    "quantization_type": Row("nf4", "fp4", keys=FOUR_BITS),
    "double_quantization": Row(True, False, keys=FOUR_BITS),
    "template": Row("chatml", "default"),
    "dataset": Row("short", "short,other", num_rows, EPOCHS),
    "eval_dataset": Row("other", "turns", evaluation, {"do_eval": True}),
    "dataset_dir": Row("@data", "@other_data"),
    "cutoff_len": Row(64, 24),
    "truncation": Row("structure", "llamafactory", keys={"cutoff_len": 24}),
    "bad_rows": Row("skip", "quarantine", files, {"dataset": "spoilt"}),
    "train_on_prompt": Row(False, True),
    "mask_history": Row(False, True, keys={"dataset": "turns"}),
    "max_samples": Row(..., 3),
    "mix_strategy": Row("interleave_under", "interleave_over", num_rows, {**MIXED, **EPOCHS}),
    "interleave_probs": Row("0.5,0.5", "0.9,0.1", num_rows, {**MIXED, **UNDER, **EPOCHS}),
    "val_size": Row(0.25, 5, evaluation, {"do_eval": True}),
    "packing": Row(False, True),
    "neat_packing": Row(False, True),
    "streaming": Row(False, True),
    "buffer_size": Row(1, 8, keys={"streaming": True}),
    "default_system": Row(..., "Answer in one word."),
    "tool_format": Row("qwen", "llama3", keys=TOOLS),
    "enable_thinking": Row(True, False, keys=THOUGHTS),
    "preserve_thinking": Row(False, True, keys={**THOUGHTS, "mask_history": True}),
    "stage": Row("sft", "pt"),
    "pref_beta": Row(0.1, 0.5, keys=PAIRS),
    "pref_ftx": Row(0.0, 1.0, keys=PAIRS),
    "pref_bco_weight": Row(0.0, 1.0, keys=PAIRS),
    "pref_loss": Row("sigmoid", "ipo", keys=PAIRS),
    "dpo_label_smoothing": Row(0.0, 0.3, keys=PAIRS),
    "ld_alpha": Row(..., 0.5, keys=PAIRS),
    "simpo_gamma": Row(0.5, 1.5, keys={**PAIRS, "pref_loss": "simpo"}),
    "kto_chosen_weight": Row(1.0, 2.0, keys=JUDGED),
    "kto_rejected_weight": Row(1.0, 2.0, keys=JUDGED),
    "ref_model": Row(..., "@other_model", keys=PAIRS),
    "ref_model_adapters": Row(..., "@adapter", keys=PAIRS),
    "ref_model_quantization_bit": Row(..., 4, keys=LOW_BIT_REFERENCE),
    "finetuning_type": Row("lora", "freeze", files),
    "pure_bf16": Row(False, True, tensors, {"fp32": ...}),
    "disable_shuffling": Row(False, True),
    "plot_loss": Row(True, ["lr"], files),
    "report_to": Row("none", "tensorboard", files),
    "additional_target": Row(..., "norm", tensors),
    "lora_alpha": Row(4, 8, weights),
    "lora_dropout": Row(0.0, 0.5, weights),
    "lora_rank": Row(2, 3, tensors),
    "lora_target": Row("all", "q_proj", tensors),
    "use_rslora": Row(False, True, weights),
    "use_dora": Row(False, True, tensors),
    "pissa_init": Row(False, True),
    "pissa_iter": Row(-1, 0, keys=PISSA),
    "pissa_convert": Row(False, True, tensors, PISSA),
    "loraplus_lr_ratio": Row(1.0, 16.0, keys={"max_grad_norm": 0.0}),
    "loraplus_lr_embedding": Row(1e-3, 1e-2, weights, LORAPLUS),
    "lora_rank_pattern": Row(..., {"q_proj": 4}, tensors),
    "lora_alpha_pattern": Row(..., {"q_proj": 64}, weights),
    "freeze_trainable_layers": Row(1, -1, weights, FREEZE),
    "freeze_trainable_modules": Row("all", "mlp", weights, FREEZE),
    "freeze_extra_modules": Row(..., "embed_tokens", weights, FREEZE),
    "learning_rate": Row(0.01, 0.02),
    "weight_decay": Row(0.0, 0.5, weights),
    "adam_beta1": Row(0.9, 0.5, weights),
    "adam_beta2": Row(0.999, 0.5, weights),
    "adam_epsilon": Row(1e-8, 1.0, weights),
    "max_grad_norm": Row(0.0, 1e-3, weights, {"adam_epsilon": 1e-3}),
    "lr_scheduler_type": Row("cosine", "constant"),
    "lr_scheduler_kwargs": Row(
        {"step_size": 1}, {"step_size": 2}, keys={"lr_scheduler_type": "step"}
    ),
    "optim_args": Row(..., "momentum=0.9", weights, {"optim": "sgd"}),
    "warmup_ratio": Row(0.0, 0.5),
    "warmup_steps": Row(0, 2),
    "do_eval": Row(False, True, files, {"val_size": 0.25}),
    "do_predict": Row(False, True, files, PREDICTS),
    "predict_with_generate": Row(False, True, scored, {**PREDICTS, "do_eval": True}),
    "per_device_train_batch_size": Row(2, 3),
    "gradient_accumulation_steps": Row(1, 2),
    "num_train_epochs": Row(1, 2, steps, {"max_steps": -1}),
    "max_steps": Row(3, 4, steps),
    "logging_steps": Row(1, 2, steps),
    "logging_first_step": Row(False, True, steps, {"logging_steps": 3}),
    "save_strategy": Row("no", "steps", files, {"save_steps": 2}),
    "save_steps": Row(2, 3, files, {"save_strategy": "steps"}),
    "save_total_limit": Row(..., 1, files, SAVES),
    "save_only_model": Row(False, True, resumable, SAVES),
    "eval_strategy": Row("no", "steps", files, {"val_size": 0.25, "eval_steps": 2}),
    "eval_steps": Row(1, 2, partial(steps, key="eval_loss"), {**VALIDATION}),
    "seed": Row(42, 43),
    "data_seed": Row(42, 43),
    "bf16": Row(False, True, keys={"fp32": ...}),
    "fp16": Row(False, True, keys={"fp32": ...}),
    "compute_dtype": Row("float32", "bfloat16", keys={"fp32": ...}),
    "dataloader_drop_last": Row(False, True, steps, {**EPOCHS, "per_device_train_batch_size": 5}),
    "train_sampling_strategy": Row("random", "group_by_length"),
    "include_effective_tokens_per_second": Row(False, True, figures),
    "include_num_input_tokens_seen": Row("no", "all", logged),
    "compute_accuracy": Row(False, True, scored, VALIDATION),
    "eval_on_each_dataset": Row(False, True, scored, {"eval_dataset": "other", "do_eval": True}),
    "eval_delay": Row(0, 3, partial(steps, key="eval_loss"), VALIDATION),
    "eval_on_start": Row(False, True, partial(steps, key="eval_loss"), VALIDATION),
    "logging_strategy": Row("steps", "no", steps),
    "early_stopping_steps": Row(..., 1, steps, {**NEVER_BETTER, **VALIDATION, "eval_steps": 1}),
    "early_stopping_threshold": Row(
        0.0, 100.0, steps, {**VALIDATION, "eval_steps": 1, "early_stopping_steps": 1}
    ),
    "load_best_model_at_end": Row(False, True, weights, {**NEVER_BETTER, **VALIDATION, **SAVES}),
    "metric_for_best_model": Row(
        "loss",
        "accuracy",
        files,
        {**VALIDATION, "save_strategy": "best", "compute_accuracy": True},
    ),
    "greater_is_better": Row(False, True, files, {**VALIDATION, "save_strategy": "best"}),
    "rope_scaling": Row("linear", "yarn", curve, {"cutoff_len": 600}),
    "moe_aux_loss_coef": Row(0.0, 1.0, curve, {"model_name_or_path": "@experts"}),
    "output_dir": Row("@first", "@second", str),
}


@pytest.mark.parametrize("key", ROWS)
def test_training_differs(key: str, site: Site) -> None:
    row = ROWS[key]
    seen = [row.see(site.train({**row.keys, key: value})) for value in (row.first, row.second)]
    assert seen[0] != seen[1]


def test_the_same_run_twice_is_the_same(site: Site) -> None:
    """What the rows above look at does not differ by itself."""
    first, second = site.train({**VALIDATION, **SAVES}), site.train({**VALIDATION, **SAVES})
    for see in (curve, files, tensors, weights, steps, evaluation, resumable, num_rows):
        assert see(first) == see(second), see


# ---- keys that something else shows -----------------------------------------------------------

Seen = Callable[[Site, Keys, pytest.MonkeyPatch], Any]


def loaded(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    model = site.arguments(keys).model
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    return load_model(site.root / "model", model, **where, gradient_checkpointing=True)


def implementation(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    return loaded(site, keys, patch).config._attn_implementation


def reentrant(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    layer = loaded(site, keys, patch).model.layers[0]
    return layer._gradient_checkpointing_func.keywords["use_reentrant"]


def offloading(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    return type(loaded(site, keys, patch).model.layers[0]._gradient_checkpointing_func).__name__


def formats(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Number formats of parameters and logits of a model in bfloat16."""
    arguments = site.arguments(keys)
    where = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    model = load_model(site.root / "model", arguments.model, **where, gradient_checkpointing=False)
    assembly._adjust(model, arguments)
    return {p.dtype for p in model.parameters()}, model(torch.tensor([[5, 6]])).logits.dtype


def liger(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []
    patch.setattr("llmray.model.kernels.use_liger", lambda model, config: asked.append(config))
    loaded(site, {"enable_liger_kernel": True, **keys}, patch)
    return asked


def of_evaluation(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> torch.dtype:
    keys = {"do_train": False, "do_eval": True, "eval_dataset": "short", **keys}
    return precision.choose_for_evaluation(site.arguments(keys), torch.device("cpu")).load_dtype


def rounding(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    patch.setattr(torch, "set_float32_matmul_precision", asked.append)
    precision.choose(site.arguments(keys), torch.device("cpu"))
    return asked


def checkpointing(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    context = Context(World.single(), "", None, site.root / "model", lambda: None)  # type: ignore[arg-type]
    return assembly._needs_checkpointing(
        site.arguments(keys), context, torch.tensor([9, 9]).numpy(), "fp32"
    )


def told(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> int:
    lines: list[str] = []
    for name in ("llmray.model.tuning.log", "llmray.model.load.log"):
        for level in ("info", "warning"):
            patch.setattr(f"{name}.{level}", lambda *words: lines.append(words[0]))
    site.train({"max_steps": 1, **keys})
    return len(lines)


def asked_of_hub(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Keys:
    asked: Keys = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings)
        return str(site.root / "model")

    patch.setenv("LLMRAY_CACHE", str(site.root / "cache"))
    patch.setattr("huggingface_hub.snapshot_download", download)
    for package in ("modelscope", "openmind_hub"):
        patch.setitem(sys.modules, package, SimpleNamespace(snapshot_download=download))
    hub.resolve("somebody/model", site.arguments(keys).model)
    return asked


def asked_of_modelscope(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Keys:
    patch.setenv("USE_MODELSCOPE_HUB", "1")
    return asked_of_hub(site, keys, patch)


def asked_of_modelers(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Keys:
    patch.setenv("USE_OPENMIND_HUB", "1")
    return asked_of_hub(site, keys, patch)


def rebuilt(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    arguments, model = site.arguments(keys), site.root / "model"
    times = []
    for token in ("one", "two"):
        ref = prepared.ensure(arguments, model, root=site.root / "rebuilt", run_token=token)
        times.append(store.read_manifest(ref.path).metadata["built_at"])
    return times[0] != times[1]


def fused(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    layer = torch.nn.Linear(2, 2)
    options = site.arguments(keys).optimizer
    return optimizers.build(layer, dict(layer.named_parameters()), options).defaults["fused"]


def first_step(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[int]:
    """Steps that the second of two runs in one directory makes itself."""
    output = f"{site.root}/twice-{site.num_runs}"
    common = {"output_dir": output, "save_strategy": "steps", "save_steps": 2}
    patch.setenv("LLMRAY_CACHE", str(site.root / "cache"))
    local.train(site.arguments({**common, "max_steps": 2}))
    made: list[int] = []
    patch.setattr(
        Engine, "optim_step", counted(Engine.optim_step, lambda engine: made.append(engine.step))
    )
    local.train(site.arguments({**common, **keys}))
    return made


def counted(function: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    def wrapped(*words: Any, **named: Any) -> Any:
        note(words[0])
        return function(*words, **named)

    return wrapped


def trains(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    path = site.root / "file.yaml"
    site.arguments(keys).save(path)
    patch.setattr(local, "train", lambda arguments: 0)
    return f"exit {cli.main(['train', str(path)])}"


def evaluation_passes(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> int:
    calls: list[Any] = []
    patch.setattr(Engine, "logprobs", counted(Engine.logprobs, calls.append))
    site.train({**VALIDATION, **keys})
    return len(calls)


def deterministic(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    try:
        site.train({"max_steps": 1, **keys})
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def chosen_precision(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(precision, "_by_hardware", lambda device: ("bf16", "of this test"))
    return precision.choose(site.arguments(keys), torch.device("cpu")).name


def timeout(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> float:
    seconds: list[float] = []

    def meet(timeout_s: float, *, use_cpu: bool) -> World:
        seconds.append(timeout_s)
        return World.single()

    patch.setattr(local.World, "from_environment", meet)
    patch.setenv("LLMRAY_CACHE", str(site.root / "cache"))
    local.train(site.arguments({"max_steps": 1, **keys}))
    return seconds[0]


def goes(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    """What a run comes to: nothing, or why it is refused."""
    try:
        site.train({"max_steps": 1, **keys})
    except ArgumentsError as error:
        return str(error)
    return ""


def goes_as_text(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    return goes(site, {**TEXT, **keys}, patch)


def told_tracker(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[Keys]:
    """What the libraries of the trackers are asked for; they then fail, which ends no run."""
    asked: list[Keys] = []

    def init(**named: Any) -> None:
        named.pop("config"), named.pop("id")  # of which the first has every key
        settings, notices = named.pop("settings"), named.pop("callbacks", [])
        key = str(settings.api_key)
        signers = [(notice._signer.webhook_url, notice._signer.secret) for notice in notices]
        asked.append({**named, "key": key, "notices": signers})
        raise ConnectionError("not in this test")

    patch.setattr("swanlab.init", init)
    patch.setattr("wandb.init", init)
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("SWANLAB_API_KEY", "of the environment")
    site.train({"max_steps": 1, "output_dir": "@tracked", **keys})
    return asked


def told_swanlab(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[Keys]:
    return told_tracker(site, {"use_swanlab": True, **keys}, patch)


def told_wandb(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[Keys]:
    return told_tracker(site, {"report_to": "wandb", **keys}, patch)


def signed(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[Keys]:
    return told_swanlab(site, {"swanlab_lark_webhook_url": "http://lark", **keys}, patch)


def board(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[str]:
    site.train({"max_steps": 1, "report_to": "tensorboard", **keys})
    return sorted(str(path.parent) for path in site.root.glob("board-*/events*"))


def ahead(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    arguments = site.arguments({"dataloader_num_workers": 1, **keys})
    return assembly.reading_ahead(arguments, torch.device("cuda"))


def released(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> int:
    calls: list[Any] = []
    patch.setattr(device_memory, "release", calls.append)
    site.train(keys)
    return len(calls)


def bar(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    return Console.of(site.arguments(keys).training).draws_bar


def device(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Where a process, torchrun's ranks and Ray's workers would compute if there were GPUs."""
    from llmray import launch
    from llmray.orchestration.plan import Inventory, Node, place

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setenv("WORLD_SIZE", "1")
    use_cpu = site.arguments(keys).training.use_cpu
    inventory = Inventory((Node("1", "127.0.0.1", {"CPU": 4.0, "GPU": 2.0}),), {})
    placement = place(site.arguments(keys).cluster, inventory, use_cpu=use_cpu)
    world = World.from_environment(60, use_cpu=use_cpu)
    return world.device.type, launch.plan(False, {}, use_cpu=use_cpu), placement.uses_gpu


def goes_with_more_tokens(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    try:
        return goes(site, {"model_name_or_path": "@wide", **keys}, patch)
    except ModelError as error:
        return str(error)


def place_of_data(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    root = site.root / "places"
    return prepared.ensure(site.arguments(keys), site.root / "model", root=root).path


def keeps_reference(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    """Whether what the reference says lies beside the prepared data."""
    site.train({**PAIRS, "cutoff_len": 61, **keys})
    return bool(list((site.root / "prepared").glob("*.reference-*")))


SEEN: dict[str, tuple[Any, Any, Seen]] = {
    "precompute_ref_logps": (False, True, keeps_reference),
    "tokenized_path": (..., "@kept-here", place_of_data),
    "resize_vocab": (False, True, goes_with_more_tokens),
    "device_map": ({"": "cpu"}, {"": 0}, goes),
    "model_max_length": (64, 65, goes),
    "block_diag_attn": (False, True, goes_as_text),
    "logging_dir": ("@board-1", "@board-2", board),
    "run_name": ("one", "two", told_wandb),
    "project": ("one", "two", told_wandb),
    "use_swanlab": (False, True, told_tracker),
    "swanlab_project": ("one", "two", told_swanlab),
    "swanlab_workspace": (..., "ours", told_swanlab),
    "swanlab_run_name": ("one", "two", told_swanlab),
    "swanlab_mode": ("cloud", "offline", told_swanlab),
    "swanlab_api_key": (..., "of the file", told_swanlab),
    "swanlab_logdir": ("@one", "@two", told_swanlab),
    "swanlab_lark_webhook_url": ("http://one", "http://two", told_swanlab),
    "swanlab_lark_secret": ("one", "two", signed),
    "flash_attn": ("sdpa", "disabled", implementation),
    "use_reentrant_gc": (False, True, reentrant),
    "disable_gradient_checkpointing": (False, True, checkpointing),
    "use_unsloth_gc": (False, True, offloading),
    "enable_liger_kernel": (False, True, liger),
    "liger_kernel_config": (..., {"rope": False}, liger),
    "upcast_layernorm": (False, True, formats),
    "upcast_lmhead_output": (False, True, formats),
    "bf16_full_eval": (False, True, of_evaluation),
    "fp16_full_eval": (False, True, of_evaluation),
    "tf32": (..., False, rounding),
    "print_param_status": (False, True, told),
    "trust_remote_code": (False, True, told),
    "cache_dir": ("@one", "@two", asked_of_hub),
    "model_revision": ("main", "v2", asked_of_hub),
    "hf_hub_token": ("one", "two", asked_of_hub),
    "ms_hub_token": ("one", "two", asked_of_modelscope),
    "om_hub_token": ("one", "two", asked_of_modelers),
    "overwrite_cache": (False, True, rebuilt),
    "optim": ("adamw_torch", "adamw_torch_fused", fused),
    "resume_from_checkpoint": (True, False, first_step),
    "overwrite_output_dir": (True, False, first_step),
    "do_train": (True, False, trains),
    "dataloader_num_workers": (1, 3, ahead),
    "dataloader_prefetch_factor": (2, 3, ahead),
    "dataloader_pin_memory": (True, False, ahead),
    "torch_empty_cache_steps": (1, 2, released),
    "disable_tqdm": (True, False, bar),
    "use_cpu": (True, False, device),
    "per_device_eval_batch_size": (1, 3, evaluation_passes),
    "full_determinism": (False, True, deterministic),
    "fp32": (..., True, chosen_precision),
    "ddp_timeout": (60, 70, timeout),
}


@pytest.mark.parametrize("key", SEEN)
def test_seen_elsewhere(key: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, see = {**SEEN, **CLUSTER, **GENERATING}[key]
    seen = []
    for value in (first, second):
        with monkeypatch.context() as patch:
            seen.append(see(site, {key: value}, patch))
    assert seen[0] != seen[1]


# ---- keys of the cluster: what Ray is asked for -------------------------------------------------


def enabled(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> bool:
    return site.arguments({"ray_num_workers": 2, **keys}).ray_enabled


def directory(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    from llmray.orchestration import train_job

    return train_job.run_directory(site.arguments({"output_dir": "@out", **keys}))


def trainer(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What Ray Train is given on a cluster of two nodes with four cores each."""
    from llmray.orchestration import train_job
    from llmray.orchestration.plan import Inventory, Node, place

    cores = {"CPU": 4.0}
    nodes = tuple(Node(name, f"127.0.0.{name}", cores) for name in "12")
    inventory = Inventory(nodes, {"CPU": 8.0})
    arguments = site.arguments({"resources_per_worker": {"CPU": 1}, **keys})
    signals = train_job.DriverSignals()
    driver = train_job._Driver(arguments, f"{site.root}/ray", signals, None, False)
    patch.setattr(train_job, "_Trainer", lambda loop, **given: given)
    placement = place(arguments.cluster, inventory)
    given: Any = driver._trainer(placement, None, {})  # type: ignore[arg-type]
    scaling, meeting = given["scaling_config"], given["torch_config"]
    return (
        scaling.num_workers,
        scaling.resources_per_worker,
        scaling.placement_strategy,
        given["run_config"].failure_config.max_failures,
        meeting.master_addr,
        meeting.master_port,
    )


def roles(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    """The actors of a reward model that are to find room on the cluster."""
    from llmray.arguments import reward_sets
    from llmray.orchestration import actors

    on_ray = {"use_ray": True, "reward_model": "scores", "reward_model_type": "full"}
    return actors.roles_of(reward_sets.of_run(site.arguments({**ppo_rows.BASE, **on_ray, **keys})))


def initialised(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Keys:
    from llmray.orchestration import cluster

    given: Keys = {}

    def init(**named: Any) -> None:
        given.update(named)
        raise ConnectionError("not in this test")

    patch.setattr(cluster.ray, "init", init)
    with pytest.raises(ClusterError):
        cluster.connect(site.arguments(keys).cluster)
    return given


def trials(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[Any]:
    """The values of the trials that `llmray tune` begins with."""
    from llmray.arguments.tune import sweep_of
    from llmray.sweep.trials import trials_of

    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "val_size": 2}
    return [trial.values for trial in trials_of(sweep_of(site.arguments({**evaluated, **keys})))]


def prepares(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    """Who prepares the data of two nodes."""
    from llmray.orchestration import prepare_job
    from llmray.orchestration.plan import Node

    ref = prepared.PreparedRef("place", "key", 1, 0, 1, 1)
    patch.setattr(prepare_job, "ready_here", lambda *given, **named: (Path("model"), ref))
    patch.setattr(prepare_job, "_prepare_together", lambda *given, **named: "all nodes together")
    patch.setattr(
        prepare_job.cluster,
        "on_nodes",
        lambda nodes, *given, **named: {n.node_id: True for n in nodes},
    )
    nodes = [Node(name, f"127.0.0.{name}", {"CPU": 4.0}) for name in "12"]
    return prepare_job.prepare(site.arguments(keys), nodes, "1", prepare_job.Environment({}, {}))


CLUSTER: dict[str, tuple[Any, Any, Seen]] = {
    "data_shared_file_system": (False, True, prepares),
    "use_ray": (True, False, enabled),
    "ray_run_name": (..., "named", directory),
    "ray_storage_path": ("/one", "/two", directory),
    "ray_num_workers": (1, 2, trainer),
    "resources_per_worker": ({"CPU": 1}, {"CPU": 2}, trainer),
    "placement_strategy": ("PACK", "SPREAD", trainer),
    "ray_max_failures": (0, 5, trainer),
    "reward_num_actors": (1, 2, roles),
    "reward_resources_per_actor": (..., {"CPU": 2}, roles),
    "reward_placement_strategy": ("PACK", "SPREAD", roles),
    "reward_label_selector": (..., {"kind": "fast"}, roles),
    "master_addr": (..., "127.0.0.1", trainer),
    "master_port": (..., 29999, trainer),
    "tune": (
        {"search": {"lora_rank": {"grid": [2, 4]}}},
        {"search": {"lora_rank": {"grid": [2, 8]}}},
        trials,
    ),
    "ray_init_kwargs": (..., {"num_cpus": 1}, initialised),
}


@pytest.mark.parametrize("key", CLUSTER)
def test_seen_by_ray(key: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    test_seen_elsewhere(key, site, monkeypatch)


# ---- keys of generation: what transformers is asked for, and what is shown --------------------


def sampling(site: Site, keys: Keys, make: Callable[..., Sampling]) -> Any:
    arguments = site.arguments(keys)
    tokenizer = load_tokenizer(site.root / "model", arguments.model)
    model = load_model(
        site.root / "model",
        arguments.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    made = make(arguments, model, tokenizer)
    return made.config(9).to_diff_dict(), made.budget(5, None)


def drawn(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    return sampling(site, keys, Sampling.of)


def in_evaluation(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    return sampling(site, keys, Sampling.for_evaluation)


def answered(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> tuple[str, torch.dtype]:
    answerer = answering.Answerer.load(site.arguments(keys))
    start = answerer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    return answerer.text([start, 40], plain=False), answerer.model.dtype


def in_beams(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    return drawn(site, {"num_beams": 2, **keys}, patch)


def without_new_tokens(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    return drawn(site, {"max_new_tokens": 0, **keys}, patch)


def placed(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> Any:
    """Where transformers is told to put weights of 4 bits that answer."""
    asked: list[Any] = []
    own = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*words: Any, **named: Any) -> Any:
        asked.append(named["device_map"])
        return own(*words, **named)

    patch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    answering.Answerer.load(site.arguments({"do_train": False, **FOUR_BITS, **keys}))
    return asked


EXPORT = {"do_train": False, "adapter_name_or_path": "@adapter", "overwrite_output_dir": True}


def exported(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> set[str]:
    """The files of an export, with their place."""
    place = Path(export.export(site.arguments({**EXPORT, "export_dir": "@exported", **keys})))
    return {str(path) for path in place.iterdir()}


def exported_where(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []
    patch.setattr(export, "default_device", lambda rank: asked.append(rank) or torch.device("cpu"))
    exported(site, keys, patch)
    return asked


def uploaded(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    patch.setattr("huggingface_hub.HfApi.create_repo", lambda hub, name, **said: names.append(name))
    patch.setattr("huggingface_hub.HfApi.upload_folder", lambda hub, **said: None)
    exported(site, keys, patch)
    return names


def reads_pickles(site: Site, keys: Keys, patch: pytest.MonkeyPatch) -> str:
    place = site.root / "pickled"
    if not place.exists():
        make_tokenizer(place)
        make_model(place)
        pickled.convert(place)
    try:
        site.train({"max_steps": 1, "model_name_or_path": "@pickled", **keys})
    except ModelError as error:
        return str(error)
    return ""


GENERATING: dict[str, tuple[Any, Any, Seen]] = {
    "quantization_device_map": (..., "auto", placed),
    "export_dir": ("@out-1", "@out-2", exported),
    "export_size": (5, 3e-5, exported),
    "export_device": ("cpu", "auto", exported_where),
    "export_legacy_format": (False, True, exported),
    "export_hub_model_id": ("org/one", "org/two", uploaded),
    "allow_pickled_weights": (False, True, reads_pickles),
    "do_sample": (True, False, drawn),
    "temperature": (0.5, 0.9, drawn),
    "top_p": (0.5, 0.9, drawn),
    "top_k": (5, 9, drawn),
    "num_beams": (1, 2, drawn),
    "max_length": (20, 30, without_new_tokens),
    "max_new_tokens": (20, 30, drawn),
    "repetition_penalty": (1.0, 1.5, drawn),
    "length_penalty": (1.0, 1.5, in_beams),
    "skip_special_tokens": (True, False, answered),
    "use_kv_cache": (True, False, drawn),
    "eval_num_beams": (..., 2, in_evaluation),
    "generation_num_beams": (..., 3, in_evaluation),
    "generation_max_length": (..., 20, in_evaluation),
    "infer_dtype": ("float32", "bfloat16", answered),
}


@pytest.mark.parametrize("key", GENERATING)
def test_seen_in_answers(key: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    test_seen_elsewhere(key, site, monkeypatch)


# ---- keys of stage ppo ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ppo_rows.RUNS)
def test_a_run_of_ppo_differs(key: str, site: Site) -> None:
    row = ppo_rows.RUNS[key]
    runs = ({**ppo_rows.BASE, **row.keys, key: value} for value in (row.first, row.second))
    first, second = (ppo_rows.told(site.train(keys)) for keys in runs)
    assert first != second


@pytest.fixture(scope="module")
def ready_for_ppo(site: Site) -> assembly.Training:
    """The parts of a run of stage ppo, before its rewards are there."""
    arguments, model_dir = site.arguments(ppo_rows.BASE), site.root / "model"
    ref = access.ready(arguments, model_dir, root=site.root / "prepared")
    context = Context(World.single(torch.device("cpu")), "", ref, model_dir, lambda: None)
    return assembly.assemble(arguments, context)


def parts_of_ppo(ready: assembly.Training, arguments: Any, patch: pytest.MonkeyPatch) -> str:
    """All that the parts of stage ppo are told, and who is asked for scores."""
    pools: list[Any] = []

    def handle(name: str, served: Any, *threads: int, **_: Any) -> tuple[Any, ...]:
        return name, served if isinstance(served, tuple) else vars(served), *threads

    patch.setattr(reinforcement, "Pool", lambda *words: pools.append(words[:2]))
    patch.setattr(rewards, "RewardApi", lambda *words: words)
    patch.setattr(reinforcement, "InProcess", handle)
    patch.setattr(rewards, "InProcess", handle)
    patch.setattr(ModelReward, "load", lambda asked, *words: asked)
    ready.core.arguments = arguments
    made = reinforcement.prepare(ready, Path("rollouts"))
    step, sources = made.step, made.rewards._sources
    weights = [(source.name, source.weight) for source in sources]
    parts = (step.options, step.control, step.collector.sampler.plan, weights, pools)
    return str((*parts, vars(step.show)))


@pytest.mark.parametrize("key", ppo_rows.PARTS)
def test_a_step_of_ppo_differs(
    key: str,
    site: Site,
    ready_for_ppo: assembly.Training,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It does for two values, and not for one that is there twice."""
    monkeypatch.chdir(tmp_path)
    row = ppo_rows.PARTS[key]
    first, second = (
        site.arguments({**ppo_rows.BASE, **row.keys, key: value, "output_dir": "@same"})
        for value in (row.first, row.second)
    )
    seen = []
    for arguments in (first, first, second):
        with monkeypatch.context() as patch:
            seen.append(parts_of_ppo(ready_for_ppo, arguments, patch))
    assert seen[0] == seen[1] != seen[2]


def test_every_key_that_works_has_a_row() -> None:
    gaps = {**capabilities.NOT_BUILT, **capabilities.NOT_SUPPORTED}
    working = {key for key in FIELDS if key not in gaps or gaps[key].works is not None}
    rows = {*ROWS, *SEEN, *CLUSTER, *GENERATING, *ppo_rows.PARTS, *ppo_rows.RUNS}
    assert rows | CHANGES_NOTHING == working
    assert not rows & CHANGES_NOTHING
