"""Every way to tune, as keys of a run, and engines for them; as a script, one rank of a pair.

    python -m torch.distributed.run --nproc-per-node 2 tests/tuning_rows.py ADAPTERS OUTPUT

trains all rows on two ranks and writes the weights of each to OUTPUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from layouts import make_rows
from safetensors.torch import save_file
from tiny import build_model, make_model
from torch import Tensor
from tuned import KEYS, saved, shake, tuned

from llmray.arguments.loading import load
from llmray.batch import Batch
from llmray.model import pissa
from llmray.model.head import TokenModel
from llmray.model.load import load_model
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import LanguageModeling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS

# row -> keys; an adapter's name stands for the folder of it, a model type for the model, `wide` for
# a folder of ordinary weights that are rounded at loading
ROWS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze-last": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "freeze-first": {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": -1,
        "freeze_trainable_modules": "mlp",
        "freeze_extra_modules": "embed_tokens",
    },
    "lora": {"additional_target": "norm", "lora_rank_pattern": {"q_proj": 2}},
    "lora-plus": {"loraplus_lr_ratio": 8, "lora_target": "all,embed_tokens"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True},
    "pissa-dora": {"pissa_init": True, "use_dora": True, "pissa_iter": -1},
    "pissa-4-bit": {"model": "wide", "pissa_init": True, "quantization_bit": 4},
    "pissa-8-bit": {"model": "wide", "pissa_init": True, "quantization_bit": 8},
    "new-adapter": {"adapter_name_or_path": "plain", "create_new_adapter": True},
    "continued": {"adapter_name_or_path": "first,plain"},
    "continued-pissa": {"adapter_name_or_path": "pissa", "pissa_init": True},
    "full-on-adapter": {"adapter_name_or_path": "plain", "finetuning_type": "full"},
    "experts": {"model": "qwen3_moe", "lora_target": "all,experts"},
}
STEPS, MIDWAY = 4, 2


def keys_of(row: str, adapters: Path) -> dict[str, Any]:
    """The keys of a row, its adapters in their folders; `model` is not among them."""
    keys = {key: value for key, value in ROWS[row].items() if key != "model"}
    if names := keys.get("adapter_name_or_path"):
        keys["adapter_name_or_path"] = ",".join(str(adapters / n) for n in names.split(","))
    return keys


def write_adapters(directory: Path) -> Path:
    """The adapters that rows go on from."""
    for seed, name in enumerate(("first", "plain", "pissa")):
        model = tuned(pissa_init=name == "pissa", lora_rank=2)
        start = pissa.of(model)
        if start is not None:
            start.begin(model, lambda own: own)
        shake(model, seed=seed, scale=0.05)
        saved(model, directory / name)
    make_model(directory / "wide", amplify=2.0, hidden_size=64)
    return directory


def engine(row: str, adapters: Path, world: World, arch: str = "llama") -> Engine:
    """The engine of a row over a tiny model, in float32."""
    keys = {"learning_rate": 0.01, "weight_decay": 0.1, **keys_of(row, adapters)}
    arguments = load({**KEYS, **keys})
    name = ROWS[row].get("model", arch)
    if name == "wide":
        model = load_model(
            adapters / name,
            arguments.model,
            dtype=torch.float32,
            device=world.device,
            gradient_checkpointing=False,
        )
    else:
        model = build_model(name, amplify=2.0)
    token_model = TokenModel(tuned(model, **keys), flat=True)
    trainable = {n: p for n, p in token_model.named_parameters() if p.requires_grad}
    options = arguments.optimizer
    return Engine(
        token_model,
        trainable,
        optimizers.build(token_model, trainable, options, arguments.finetuning),
        schedules.schedule(options, STEPS),
        world=world,
        precision=PRECISIONS["fp32"],
        max_grad_norm=1.0,
    )


def train(of: Engine, first: int, last: int) -> None:
    """Make the updates from number `first` to before `last`; ranks share each step's rows."""
    for step in range(first, last):
        parts: list[Batch] = [make_rows((9, 5), seed=2 * step + part).flat for part in (0, 1)]
        of.forward_backward(parts[of.world.rank :: of.world.world_size], LanguageModeling())
        of.optim_step()


def weights(of: Engine) -> dict[str, Tensor]:
    """All of the model's weights, frozen ones too, by name; of low-bit ones the scales as well."""
    found = {name: p.data.detach().clone() for name, p in of.model.named_parameters()}
    for name, module in of.model.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{name}.scales"] = module.weight.quant_state.absmax.clone()
        elif isinstance(module, Linear8bitLt):
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            found[f"{name}.scales"] = scales.clone()
    return found


def main(adapters: Path, output: Path) -> None:
    """Train all rows as this rank."""
    world = World.from_environment(use_cpu=True)
    for row in ROWS:
        of = engine(row, adapters, world)
        train(of, 0, STEPS)
        save_file(weights(of), output / f"{row}-{world.rank}.safetensors")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
