"""Low-bit weights: really in low bits, the same everywhere, trained beside, refused where not."""

import json
import logging
import shutil

import bitsandbytes
import pytest
import torch
from layouts import lone_logits, make_rows, target_logprobs
from safetensors.torch import load_file, save_file
from tiny import build_model, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmray import local
from llmray.arguments.loading import load
from llmray.arguments.model import ModelArguments
from llmray.arguments.optimizer import OptimizerArguments
from llmray.errors import ArgumentsError, ModelError
from llmray.model import export, quantize, tuning
from llmray.model.attention import native
from llmray.model.head import TokenModel
from llmray.model.load import load_model
from llmray.serve import answering
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import LanguageModeling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS
from llmray.train.summary import cost_of

CPU = torch.device("cpu")
RUN = {
    "stage": "sft",
    "do_train": True,
    "dataset": "identity",
    "template": "chatml",
    "output_dir": "out",
    "lora_rank": 4,
    "model_name_or_path": "m",
}
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "qwen3_moe"]
KINDS = {
    "nf4": {"quantization_bit": 4},
    "fp4": {"quantization_bit": 4, "quantization_type": "fp4"},
    "plain scales": {"quantization_bit": 4, "double_quantization": False},
    "int8": {"quantization_bit": 8},
}
# 4-bit rows are whole blocks of 64 on a CPU
WIDE = {"hidden_size": 64, "head_dim": 16}
# the 16 values of NF4, appendix E of https://arxiv.org/abs/2305.14314
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("low-bit")
    return {arch: make_model(root / arch, arch, amplify=3.0, **WIDE) for arch in ARCHITECTURES}


def loaded(directory, *, dtype=torch.float32, **keys):
    return load_model(
        directory, ModelArguments(**keys), dtype=dtype, device=CPU, gradient_checkpointing=False
    )


def engine(model, *, precision="fp32", **keys):
    """An engine of an adapter on `model`."""
    numbers = PRECISIONS[precision]
    arguments = load({**RUN, "quantization_bit": 4, **keys}, environ={})
    tuned = tuning.apply(model, arguments, is_trainable=True, upcast=not numbers.pure)
    token_model = TokenModel(tuned, flat=True)
    trainable = tuning.trainable(token_model)
    options = OptimizerArguments(learning_rate=0.02)
    return Engine(
        token_model,
        trainable,
        optimizers.build(token_model, trainable, options),
        schedules.schedule(options, 20),
        world=World.single(CPU),
        precision=numbers,
        max_grad_norm=1.0,
    )


def train(of, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        batch = make_rows((9, 14), seed=step % 2).flat
        losses.append(of.forward_backward([batch], LanguageModeling()).loss.item())
        of.optim_step()
    return losses


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_weights_are_in_low_bits_and_near_the_file(folders, arch, kind, caplog):
    keys = KINDS[kind]
    with caplog.at_level(logging.INFO, logger="llmray"):
        model = loaded(folders[arch], **keys)
    bits, dtype = keys["quantization_bit"], {4: torch.uint8, 8: torch.int8}
    source = load_file(folders[arch] / "model.safetensors")
    low = {name: p for name, p in model.named_parameters() if not p.is_floating_point()}
    assert {name for name in low if "self_attn" in name} == {
        f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qkvo"
    }
    for name, parameter in low.items():
        assert parameter.dtype == dtype[bits]
        assert parameter.nbytes == source[name].numel() * bits // 8
        assert quantize.num_weights(parameter) == source[name].numel()
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    expected = lone_logits(build_model(arch, amplify=3.0, **WIDE), make_rows().sequences)
    found = lone_logits(model, make_rows().sequences)
    assert 1e-4 < (found - expected).std() / expected.std() < (0.5 if bits == 4 else 0.05)
    counts = [quantize.num_weights(p) for p in model.parameters()]
    assert sum(counts) == sum(p.numel() for p in build_model(arch, **WIDE).parameters())
    [line] = [line for line in caplog.messages if "are in low bits" in line]
    share = sum(map(quantize.num_weights, low.values())) / sum(counts)
    assert line.startswith(f"{100 * share:.0f} % of {sum(counts):,} weights")
    assert ("experts' joint matrices" in caplog.text) == (arch == "qwen3_moe")


def test_nf4_is_that_of_the_paper(folders):
    model = loaded(folders["llama"], quantization_bit=4, double_quantization=False)
    source = load_file(folders["llama"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    blocks = source[name].reshape(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    expected = torch.tensor(NF4)[nearest] * blocks.abs().amax(1, keepdim=True)
    found = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    # the table above has four digits; a weight midway between two values may go either way
    near = (found.reshape(-1, 64) - expected).abs() < 1e-4 * blocks.abs().max()
    assert near.float().mean() > 0.999


def test_rows_that_are_no_whole_blocks_would_get_wrong_scales_on_a_cpu(tiny_llama_dir):
    """The reason for the refusal: remove it when this begins to fail."""
    with pytest.raises(ModelError, match="takes 32 values, but 4-bit weights on a CPU need"):
        loaded(tiny_llama_dir, quantization_bit=4)
    drawn = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight = drawn * torch.arange(1, 65)[:, None]
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    error = bitsandbytes.functional.dequantize_4bit(packed, state) - weight
    assert error.abs().mean() > 0.3 * weight.abs().mean()  # of 0.07 in whole blocks
    assert quantize.is_low_bit(loaded(tiny_llama_dir, quantization_bit=8))


def test_double_quantization_takes_less_for_the_scales(folders):
    one = loaded(folders["llama"], quantization_bit=4, double_quantization=False)
    two = loaded(folders["llama"], quantization_bit=4, double_quantization=True)
    name = "model.layers.0.mlp.up_proj.weight"
    scales = [model.get_parameter(name).quant_state.absmax for model in (one, two)]
    assert [scale.dtype for scale in scales] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_is_in_the_dtype_asked_for(folders, dtype):
    model = loaded(folders["llama"], quantization_bit=4, dtype=dtype)
    kinds = {m.compute_dtype for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert kinds == {dtype}
    assert model.lm_head.weight.dtype == dtype


def test_an_evaluation_neither_repacks_weights_nor_cuts_gradients(folders, monkeypatch):
    """A CPU with bf16 instructions would have bitsandbytes do both, for good."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = loaded(folders["llama"], quantization_bit=4)
    of = engine(model, lora_target="q_proj")
    batch = make_rows().flat
    weight = model.model.layers[1].mlp.up_proj.weight
    before = weight.data.clone()
    first = of.logprobs(batch).logprobs
    assert torch.equal(weight.data, before)
    of.forward_backward([batch], LanguageModeling())
    grads = [p.grad for name, p in of._trainable.items() if "lora_B" in name]
    assert len(grads) == 2
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert torch.equal(of.logprobs(batch).logprobs, first)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_loss_of_an_adapter_on_low_bits_falls_and_the_base_stays(folders, arch, bits):
    model = loaded(folders[arch], quantization_bit=bits)
    names = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    before = {name: model.get_parameter(name).data.clone() for name in names}
    of = engine(model, quantization_bit=bits)
    assert {p.dtype for p in of._trainable.values()} == {torch.float32}
    losses = train(of, 12)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    layers = dict(model.named_modules())
    for name, weight in before.items():
        layer = layers.get(name.removesuffix(".weight"))
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        assert torch.equal(layer.weight.data, weight), name


@pytest.mark.parametrize("bits", [4, 8])
def test_a_resume_is_equal_to_the_bit(folders, bits):
    def fresh():
        return engine(loaded(folders["llama"], quantization_bit=bits), quantization_bit=bits)

    whole = fresh()
    train(whole, 6)
    half = fresh()
    train(half, 3)
    half.logprobs(make_rows().flat)
    rest = fresh()
    rest.load_state_dict(half.state_dict())
    train(rest, 3, first=3)
    for name, parameter in whole._trainable.items():
        assert torch.equal(rest._trainable[name], parameter), name


@pytest.mark.parametrize("bits", [4, 8])
def test_mixed_precision_trains_in_float32_beside_bf16(folders, bits):
    model = loaded(folders["llama"], quantization_bit=bits, dtype=torch.bfloat16)
    of = engine(model, precision="bf16", quantization_bit=bits)
    assert {p.dtype for p in of._trainable.values()} == {torch.float32}
    losses = train(of, 12)
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_recomputed_activations_give_the_same_gradients(folders, bits, is_reentrant):
    found = []
    for recomputes in (False, True):
        model = load_model(
            folders["llama"],
            ModelArguments(quantization_bit=bits, use_reentrant_gc=is_reentrant),
            dtype=torch.float32,
            device=CPU,
            gradient_checkpointing=recomputes,
        )
        of = engine(model, quantization_bit=bits)
        of.forward_backward([make_rows().flat], LanguageModeling())
        found.append({name: p.grad for name, p in of._trainable.items()})
    assert any(grad.abs().sum() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("bits", "keys"),
    [(4, {"use_dora": True}), (4, {"use_rslora": True}), (8, {"use_rslora": True})],
    ids=str,
)
def test_kin_of_lora_beside_low_bits(folders, tmp_path, bits, keys):
    """An adapter begins where the low bits are, trains, and comes back from its file."""
    bare = TokenModel(loaded(folders["llama"], quantization_bit=bits), flat=True)
    of = engine(loaded(folders["llama"], quantization_bit=bits), quantization_bit=bits, **keys)
    batch = make_rows().flat
    with torch.no_grad():
        begun = bare.eval()(batch).logprobs
    torch.testing.assert_close(of.logprobs(batch).logprobs, begun, atol=1e-3, rtol=0)
    losses = train(of, 12)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    export.write_weights(of.model.model, tmp_path / "adapter", make_tokenizer(tmp_path))
    named = {**RUN, "adapter_name_or_path": str(tmp_path / "adapter"), "quantization_bit": bits}
    low = loaded(folders["llama"], quantization_bit=bits)
    again = tuning.apply(low, load(named, environ={}), is_trainable=False, upcast=False)
    with torch.no_grad():
        found = TokenModel(again, flat=True).eval()(batch).logprobs
    torch.testing.assert_close(found, of.logprobs(batch).logprobs, atol=1e-5, rtol=0)


def test_dora_beside_8_bits_on_a_cpu(folders, tmp_path):
    with pytest.raises(ArgumentsError, match="use_dora=true beside weights of 8 bits"):
        engine(loaded(folders["llama"], quantization_bit=8), quantization_bit=8, use_dora=True)
    of = engine(loaded(folders["llama"], quantization_bit=4), use_dora=True)
    export.write_weights(of.model.model, tmp_path / "adapter", make_tokenizer(tmp_path))
    named = {**RUN, "adapter_name_or_path": str(tmp_path / "adapter"), "quantization_bit": 8}
    low = loaded(folders["llama"], quantization_bit=8)
    with pytest.raises(ArgumentsError, match="use_dora=true beside weights of 8 bits"):
        tuning.apply(low, load(named, environ={}), is_trainable=False, upcast=False)


def test_pure_bf16_trains_in_bf16(folders):
    model = loaded(folders["llama"], quantization_bit=4, dtype=torch.bfloat16)
    of = engine(model, precision="pure_bf16")
    assert {p.dtype for p in of._trainable.values()} == {torch.bfloat16}
    losses = train(of, 12)
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


def test_an_adapter_of_low_bits_goes_onto_ordinary_weights_and_answers_beside_low_ones(
    folders, tmp_path, caplog
):
    of = engine(loaded(folders["llama"], quantization_bit=4))
    train(of, 4)
    export.write_weights(of.model.model, tmp_path / "adapter", make_tokenizer(tmp_path))
    expected = of.logprobs(make_rows().flat).logprobs
    names = {"adapter_name_or_path": str(tmp_path / "adapter")}
    seen = {}
    for bits in (None, 4):
        arguments = load({**RUN, **names, "quantization_bit": bits}, environ={})
        model = loaded(folders["llama"], quantization_bit=bits)
        with caplog.at_level(logging.INFO, logger="llmray"):
            tuned = tuning.apply(model, arguments, is_trainable=False, upcast=False)
        assert not tuning.trainable(tuned)
        with torch.no_grad():
            seen[bits] = TokenModel(tuned, flat=True)(make_rows().flat).logprobs
    assert torch.equal(seen[4], expected)
    assert "answers beside the low-bit weights" in caplog.text
    assert 0 < (seen[None] - expected).abs().mean() < 0.5  # the base is other, the adapter is there
    bare = lone_logits(build_model(amplify=3.0, **WIDE), make_rows().sequences)
    assert (seen[None] - target_logprobs(bare, make_rows().flat.target_ids)).abs().max() > 0.1


def test_chat_and_evaluation_beside_low_bits(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    make_tokenizer(folder)
    of = engine(loaded(folder, quantization_bit=4))
    train(of, 4)
    export.write_weights(of.model.model, tmp_path / "adapter", make_tokenizer(tmp_path))
    rows = [{"instruction": f"Say {i}.", "output": "word " * i} for i in range(1, 5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    keys = {
        **RUN,
        "model_name_or_path": str(folder),
        "adapter_name_or_path": str(tmp_path / "adapter"),
        "quantization_bit": 4,
        "infer_dtype": "float32",
        "max_new_tokens": 3,
        "do_sample": False,
        "do_train": False,
        "do_eval": True,
        "dataset": None,
        "eval_dataset": "rows",
        "dataset_dir": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "fp32": True,
        "report_to": "none",
    }
    arguments = load({key: value for key, value in keys.items() if value is not None}, environ={})
    answerer = answering.Answerer.load(arguments)
    prompt = [3, 40, 50, 60]
    [ids] = answerer.generate([prompt])
    network = of.model.model.eval()
    with torch.no_grad(), native(network):
        logits = network(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    assert not ids or ids[0] == int(logits.argmax())
    assert local.train(arguments) == 0
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 < found["eval_loss"] < 20


def test_packed_weights_count_as_what_they_stand_for(folders, caplog):
    ordinary, low = loaded(folders["llama"]), loaded(folders["llama"], quantization_bit=4)
    assert cost_of(low.requires_grad_(False)) == cost_of(ordinary.requires_grad_(False))
    with caplog.at_level(logging.INFO, logger="llmray"):
        engine(low)
    [line] = [line for line in caplog.messages if "parameters train" in line]
    trained, total = (int(word.replace(",", "")) for word in line.split()[:3:2])
    assert total - trained == sum(p.numel() for p in ordinary.parameters())


# ---- checkpoints that are quantised already ---------------------------------------------------


def quantized_folder(directory, arch="llama", *, skip=None, **keys):
    """A bitsandbytes checkpoint, as others publish it."""
    make_model(directory / "plain", arch, amplify=3.0, tie_word_embeddings=False, **WIDE)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **keys)
    model = AutoModelForCausalLM.from_pretrained(
        directory / "plain", dtype=torch.float32, quantization_config=config, device_map=CPU
    )
    model.save_pretrained(directory / "low")
    make_tokenizer(directory / "low")
    return directory / "low"


@pytest.mark.parametrize("skip", [None, ["nothing"]], ids=["head kept", "head quantised"])
def test_a_checkpoint_in_low_bits_loads_as_it_is(tmp_path, skip):
    model = loaded(quantized_folder(tmp_path, skip=skip, bnb_4bit_quant_type="nf4"))
    head = model.get_output_embeddings()
    assert isinstance(head, bitsandbytes.nn.Linear4bit) == (skip is not None)
    rows = make_rows()
    expected = target_logprobs(lone_logits(model, rows.sequences), rows.flat.target_ids)
    token_model = TokenModel(model, flat=True)
    assert not token_model.uses_own_head
    with torch.no_grad():
        found = token_model(rows.flat).logprobs
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-4, rtol=0)
    losses = train(engine(model, lora_target="all"), 10)
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])


@pytest.mark.parametrize("finetuning_type", ["full", "freeze"])
def test_low_bits_of_a_checkpoint_do_not_train(tmp_path, finetuning_type):
    model = loaded(quantized_folder(tmp_path))
    arguments = load({**RUN, "finetuning_type": finetuning_type}, environ={})
    with pytest.raises(ArgumentsError, match="in low bits, which do not train"):
        tuning.apply(model, arguments, is_trainable=True, upcast=True)


def test_bits_that_the_checkpoint_has_may_be_said_and_others_not(tmp_path):
    folder = quantized_folder(tmp_path)
    assert quantize.is_low_bit(loaded(folder, quantization_bit=4))
    with pytest.raises(
        ArgumentsError, match=r"quantization_bit=8, but .* already, as bitsandbytes"
    ):
        loaded(folder, quantization_bit=8)


def claims(folder, **said):
    """Let the folder's configuration say how its weights are quantised."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": said}))
    return folder


@pytest.mark.parametrize(
    ("name", "packages"),
    [("gptq", "optimum.* and gptqmodel"), ("awq", "gptqmodel"), ("aqlm", "aqlm"), ("hqq", "hqq")],
)
def test_a_format_whose_package_is_missing(folders, tmp_path, name, packages, monkeypatch):
    monkeypatch.setattr(quantize, "find_spec", lambda module: None)
    folder = claims(shutil.copytree(folders["llama"], tmp_path / "m"), quant_method=name, bits=4)
    with pytest.raises(ModelError, match=f"{name} need {packages}.*pip install"):
        loaded(folder)


def test_a_format_that_is_not_read(folders, tmp_path):
    folder = claims(shutil.copytree(folders["llama"], tmp_path / "m"), quant_method="spqr")
    with pytest.raises(ModelError, match="quantised as spqr, which is not read here"):
        loaded(folder)


def test_fp8_becomes_ordinary_weights(folders, tmp_path):
    """As DeepSeek's files: a scale for each block of 16 by 16, weight = scale * fp8."""
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].reshape(rows // 16, 16, columns // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        low = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        expected[name] = (low.float() * scale[:, None, :, None]).reshape(rows, columns)
        tensors[name] = low.reshape(rows, columns)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    model = loaded(claims(folder, **said))
    assert not quantize.is_low_bit(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).data, weight, atol=1e-6, rtol=1e-5)
    export.write_weights(model, tmp_path / "out", make_tokenizer(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ArgumentsError, match="quantised already, as fp8"):
        loaded(folder, quantization_bit=4)


def test_mxfp4_becomes_ordinary_weights(tmp_path):
    """As gpt-oss's files: blocks of 32 four-bit floats, the low half first, times 2^(e-127)."""
    folder = make_model(tmp_path / "m", "gpt_oss", hidden_size=64, intermediate_size=64)
    tensors = load_file(folder / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([values, -values])
    expected = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, height = tensors[name].shape
        drawn = torch.Generator().manual_seed(len(expected))
        low = torch.randint(0, 16, (experts, height, width // 32, 32), generator=drawn)
        exponent = torch.randint(120, 124, (experts, height, width // 32), generator=drawn)
        scale = 2.0 ** (exponent - 127)
        wide = (table[low] * scale[..., None]).reshape(experts, height, width)
        expected[name] = wide.transpose(1, 2)
        del tensors[name]
        packed = low[..., ::2] | (low[..., 1::2] << 4)
        tensors[f"{name}_blocks"] = packed.to(torch.uint8)
        tensors[f"{name}_scales"] = exponent.to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = loaded(claims(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"]))
    assert not quantize.is_low_bit(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert expected
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name).data, weight), name
