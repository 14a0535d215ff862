"""The estimate of memory beside live tensors of a step, beside arithmetic, and what it decides."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import make_model

from llmray import assembly
from llmray.arguments.loading import load
from llmray.data.collate import collate
from llmray.data.shards import Sample
from llmray.errors import ModelError
from llmray.model import architecture, fitting, memory, trained
from llmray.train import device_memory, optimizers, precision
from llmray.train.engine import Engine
from llmray.train.parallel import World
from llmray.train.schedules import ByStep
from llmray.train.stages import STAGES

CPU = torch.device("cpu")
# large enough for tensors to outweigh what is not counted, small enough for a second
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
METHODS = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "lora": {"finetuning_type": "lora"},
    "first": {"finetuning_type": "freeze", "freeze_trainable_layers": -1},
    "dropout": {"finetuning_type": "lora", "lora_dropout": 0.1},
    "some": {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "lora_rank": 32},
    "fused": {"finetuning_type": "full", "optim": "adamw_torch_fused"},
    "sgd": {"finetuning_type": "full", "optim": "sgd"},
    "qlora": {"finetuning_type": "lora", "quantization_bit": 4},
    "8 bits": {"finetuning_type": "lora", "quantization_bit": 8},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    for arch in ("llama", "qwen3", "gemma3_text", "qwen3_moe"):
        extra = {"moe_intermediate_size": 192} if "moe" in arch else {}
        extra |= {"head_dim": 32} if arch != "llama" else {}
        if arch == "gemma3_text":
            kinds = ["sliding_attention", "full_attention"]
            extra |= {"layer_types": kinds * 2, "sliding_window": 64}
        make_model(root / arch, arch, **SIZES, **extra)
    return root


def run_of(directory, recomputes=False, dtype="fp32", **keys):
    base = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(directory),
        "dataset": "none",
        "output_dir": "none",
        "template": "chatml",
        "per_device_train_batch_size": 2,
        dtype: True,
        "disable_gradient_checkpointing": not recomputes,
    }
    return load(base | keys, environ={})


def live(directory, arguments, length):
    """The peak of live tensors in a second step, by the profiler's memory events."""
    numbers = precision.choose(arguments, CPU)
    context = assembly.Context(World.single(CPU), "", None, directory, lambda: None)
    model = assembly._token_model(arguments, context, numbers, flat=True)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizers.build(model, trainable, arguments.optimizer)
    engine = Engine(
        model,
        trainable,
        optimizer,
        ByStep(lambda step: 1.0),
        world=World.single(CPU),
        precision=numbers,
        max_grad_norm=1.0,
    )
    objective = STAGES["sft"].objective(arguments)
    rows = [Sample(np.arange(length, dtype=np.int32), np.ones(length, bool)) for _ in range(2)]
    batch = collate(rows, flat=True, pad_id=0)
    engine.forward_backward([batch], objective)
    engine.optim_step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *states]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, torch.Tensor)
    }
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        engine.forward_backward([batch], objective)
        engine.optim_step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return sum(held.values()) + int(np.cumsum(sizes).max())


CASES = [
    *[("llama", method, False, "fp32") for method in METHODS],
    *[("llama", method, True, "fp32") for method in ("full", "freeze", "lora")],
    *[("llama", method, False, "bf16") for method in ("full", "lora")],
    ("llama", "lora", False, "pure_bf16"),
    *[(arch, m, False, "fp32") for arch in ("qwen3", "gemma3_text") for m in ("full", "lora")],
    *[("qwen3_moe", method, False, "fp32") for method in ("full", "lora")],
]


@pytest.mark.parametrize(("arch", "method", "recomputes", "dtype"), CASES)
def test_within_fifteen_percent_of_live_tensors(arch, method, recomputes, dtype, folders):
    arguments = run_of(folders / arch, recomputes, dtype, **METHODS[method])
    found = memory.estimate_for(arguments, folders / arch, [512, 512], dtype, recomputes=recomputes)
    measured = live(folders / arch, arguments, 512)
    assert found.peak == pytest.approx(measured, rel=0.15), found.phases


def test_parts_by_hand(folders):
    """Llama of the sizes above, float32, full: P values. Weights and gradients 4 P bytes each, two
    moments 8 P; the optimizer's update holds one more copy of all.
    """
    model = architecture.decoder(architecture.read_config(folders / "llama"))
    table = architecture.shapes(folders / "llama")
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128
    number = 2048 * 128 + 4 * layer + 128
    assert architecture.count(table) == number
    assert architecture.count(architecture.shapes_of(model)) == number
    found = memory.estimate_for(
        run_of(folders / "llama", finetuning_type="full"),
        folders / "llama",
        [9],
        "fp32",
        recomputes=False,
    )
    assert (found.weights, found.gradients, found.optimizer) == (4 * number, 4 * number, 8 * number)
    assert found.phases["update"] == 20 * number
    assert found.peak == found.phases["update"]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen3_moe"])
def test_a_configuration_alone_counts_nearly_as_many_values(arch, folders):
    model = architecture.decoder(architecture.read_config(folders / arch))
    by_headers = architecture.count(architecture.shapes(folders / arch))
    assert architecture.count(architecture.shapes_of(model)) == pytest.approx(by_headers, rel=0.01)


def test_an_adapter_by_hand(folders):
    """Rank 8 on q (128 -> 128) and v (128 -> 64) of four layers: 8 * (256 + 192) * 4 values."""
    arguments = run_of(folders / "llama", finetuning_type="lora", lora_target="q_proj,v_proj")
    model = architecture.decoder(architecture.read_config(folders / "llama"))
    table = architecture.shapes(folders / "llama")
    found = trained.what_trains(arguments.finetuning, model, table)
    assert found.num_adapter == 8 * (256 + 192) * 4
    assert not found.own


def test_preferences_need_a_second_model_unless_an_adapter_is_switched_off(folders):
    def weights(**keys):
        arguments = run_of(folders / "llama", **keys)
        return memory.estimate_for(
            arguments, folders / "llama", [9], "fp32", recomputes=False
        ).weights

    number = architecture.count(architecture.shapes(folders / "llama"))
    assert weights(stage="dpo", finetuning_type="full") == 2 * 4 * number
    assert weights(stage="dpo", pref_loss="simpo", finetuning_type="full") == 4 * number
    assert weights(stage="dpo") == weights(stage="sft")
    reward = {"stage": "ppo", "reward_model": "a:b"}
    assert weights(**reward, finetuning_type="full") == 2 * 4 * number
    assert weights(**reward) == weights(stage="sft")


def test_padded_rows_count_their_padding_and_all_scores(folders):
    """Rows of 30 and 10: 60 positions in place of 40, and 30 scores for each of 4 heads."""

    def activations(**keys):
        arguments = run_of(folders / "llama", finetuning_type="lora", **keys)
        return memory.estimate_for(
            arguments, folders / "llama", [30, 10], "fp32", recomputes=False
        ).activations

    flat, padded = activations(), activations(flash_attn="disabled")
    assert padded == flat * 60 / 40 + 60 * 4 * (4 * 30) * 4


def test_four_bits_by_hand():
    """A scale of 4 bytes for 64 values; doubly: one byte for 64, four for 64 * 256."""
    assert memory.quantized_bytes(4, doubly=False) == 0.5 + 4 / 64
    assert memory.quantized_bytes(4, doubly=True) == 0.5 + 1 / 64 + 4 / 16384
    assert memory.quantized_bytes(8, doubly=True) == 1


def test_pissa_takes_matrices_apart_and_beside_low_bits_reads_the_model_again(folders):
    """The largest matrix three times in double precision; the files' pages can be dropped."""
    number = architecture.count(architecture.shapes(folders / "llama"))

    def found(**keys):
        arguments = run_of(folders / "llama", **keys)
        return memory.estimate_for(arguments, folders / "llama", [9], "fp32", recomputes=False)

    assert (found().start, found().reread) == (0, 0)
    whole, low = found(pissa_init=True), found(pissa_init=True, quantization_bit=4)
    assert (whole.start, whole.reread) == (3 * 8 * 128 * 384, 0)
    assert (low.start, low.reread) == (3 * 8 * 128 * 384, 4 * number)
    assert low.peak == low.phases["start"] == low.weights + low.start + low.reread
    assert low.resident == found(quantization_bit=4).resident


def test_weights_that_are_quantised_in_their_files_are_counted_as_they_lie_there(folders, tmp_path):
    source = folders / "llama"
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    arguments = run_of(tmp_path, lora_target="q_proj", bf16=True, fp32=None)
    found = memory.estimate_for(arguments, tmp_path, [9], "bf16", recomputes=False)
    number = architecture.count(architecture.shapes(source))
    assert architecture.stored_bytes(source) == 4 * number
    assert found.weights == 4 * number + 4 * 8 * 256 * 4  # an adapter of float32 beside them


def test_what_stays_mapped():
    """Frozen weights in the format of their file; not one by one experts, which are joined."""
    model = architecture.Decoder(
        "llama",
        1,
        8,
        1,
        8,
        8,
        8,
        16,
        32,
        True,
        False,
        2,
        False,
        0,
        architecture.Experts(2, 1, 4, 0),
    )
    plain = {"model.embed_tokens.weight": (32, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)}
    lone = {"model.layers.0.mlp.experts.0.up_proj.weight": (4, 8)}
    arguments = run_of("nowhere", lora_target="q_proj")

    def mapped(formats, table, device="cpu"):
        at = memory.Situation(8, 8, "fp32", False, device, formats=frozenset(formats))
        return memory.estimate(arguments, model, table, at).mapped

    assert mapped({"F32"}, plain) == 4 * (32 * 8 + 8 * 8)
    assert mapped({"F32"}, plain | lone) == 4 * (32 * 8 + 8 * 8)
    assert mapped({"BF16"}, plain) == mapped({"F32"}, plain, "cuda") == 0


def test_shards_divide_what_they_spread(folders):
    arguments = run_of(folders / "llama", finetuning_type="full")
    model = architecture.decoder(architecture.read_config(folders / "llama"))
    table = architecture.shapes(folders / "llama")

    def of(*shards):
        at = memory.Situation(64, 32, "fp32", True, "cuda", 4, frozenset(shards))
        return memory.estimate(arguments, model, table, at)

    whole, first, second = of(), of("optimizer"), of("optimizer", "gradients")
    third = of("optimizer", "gradients", "weights")
    assert first.optimizer * 4 == whole.optimizer
    assert (first.gradients, second.gradients * 4) == (whole.gradients, whole.gradients)
    largest = 2048 * 128 * 4
    assert third.weights == whole.weights // 4 + 2 * largest
    assert whole.keeps_gradients  # buckets of all gradients live as long as the run


def test_no_torch_is_needed(folders):
    code = (
        "import sys; from llmray.arguments.loading import load; from llmray.model import fitting;"
        f"import json; keys = json.loads({json.dumps(json.dumps({'p': str(folders / 'llama')}))});"
        "a = load({'model_name_or_path': keys['p']}, environ={});"
        "from pathlib import Path;"
        "from llmray.model.memory import estimate_for;"
        "print(estimate_for(a, Path(keys['p']), [64], 'fp32', recomputes=True).peak);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# ---- what follows from it ------------------------------------------------------------------------


def decided(folders, free, *, said=None, lengths=(512, 512), **keys):
    arguments = run_of(folders / "llama", **keys, disable_gradient_checkpointing=said)
    room = fitting.Room(free, "fp32", "cpu", 1)
    return fitting.choose_recomputation(arguments, folders / "llama", lengths, room)


def test_activations_are_recomputed_where_they_would_not_fit(folders, caplog):
    arguments = run_of(folders / "llama", finetuning_type="lora")
    need = [
        memory.estimate_for(arguments, folders / "llama", [512, 512], "fp32", recomputes=r).peak
        for r in (False, True)
    ]
    assert decided(folders, int(1.2 * need[0])) is False
    with caplog.at_level("INFO", "llmray"):
        assert decided(folders, int(1.1 * need[0])) is True
    assert "gradient checkpointing on: without it the run needs about" in caplog.text
    assert decided(folders, int(1.05 * need[0]), said=True) is False
    assert decided(folders, 1 << 40, said=False) is True
    assert decided(folders, 1 << 40, use_unsloth_gc=True) is True


def test_too_little_memory_says_by_how_much_and_what_would_help(folders):
    with pytest.raises(ModelError, match=r"GB too few\. What would help most") as error:
        decided(folders, 10_000_000, finetuning_type="full")
    text = str(error.value)
    assert "finetuning_type: lora (" in text
    assert text.count(" GB)") >= 3 + 1
    assert "optimizer" in text


def test_within_the_estimates_error_it_is_a_warning(folders, caplog):
    arguments = run_of(folders / "llama", True, finetuning_type="full")
    need = memory.estimate_for(
        arguments, folders / "llama", [512, 512], "fp32", recomputes=True
    ).peak
    decided(folders, int(need * 0.95), said=False, finetuning_type="full")
    assert "too few. What would help" in caplog.text
    decided(folders, int(need * 1.05), said=False, finetuning_type="full")
    assert "memory will be scarce" in caplog.text


def test_types_that_were_not_measured_are_never_refused(folders, caplog, monkeypatch):
    monkeypatch.setattr(fitting, "MEASURED", set())
    decided(folders, 10_000_000, finetuning_type="full")
    assert "too few" in caplog.text


def test_a_model_of_unknown_sizes_runs_without_an_estimate(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 8}')
    room = fitting.Room(10, "fp32", "cpu", 1)
    for said, expected in ((None, False), (False, True)):
        arguments = run_of(tmp_path, disable_gradient_checkpointing=said)
        assert fitting.choose_recomputation(arguments, tmp_path, [9], room) is expected
    assert "memory is not estimated: the model's configuration has no" in caplog.text


def test_a_container_has_what_its_group_leaves(tmp_path, monkeypatch):
    """Limit 1000, in use 700 of which 200 are files that can go: 500 are left."""
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 400\ninactive_file 200\n"),
    ):
        (tmp_path / name).write_text(text)
    group = (tmp_path, "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(device_memory, "CGROUPS", (group,))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device_memory.free_bytes(CPU) == 500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_memory.free_bytes(CPU) == 250
    (tmp_path / "memory.max").write_text("max\n")
    assert device_memory.free_bytes(CPU) > 1000


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", '{"hidden_size": 8}', "configuration has no num_attention_heads"),
        ("model.safetensors", "12", "is damaged"),
    ],
)
def test_damaged_files(name, text, said, folders, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders / "llama" / file).read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=said):
        memory.estimate_for(run_of(tmp_path), tmp_path, [9], "fp32", recomputes=False)
