"""`llmray export`: what is written gives the logits of what was trained, or nothing is written."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from layouts import lone_logits, make_rows
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from tuned import saved, shake

from llmray import cli, export, store
from llmray.arguments.loading import load
from llmray.errors import ArgumentsError, ModelError, StoreError
from llmray.model import adapters, pissa, tuning
from llmray.model.load import load_model

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "qwen3_moe"]
ROWS = make_rows().sequences
TRAINING = {"stage": "sft", "do_train": True, "dataset": "demo", "output_dir": "out"}


def base_of(root, arch, **overrides):
    make_tokenizer(root)
    return make_model(root, arch, amplify=2.0, **overrides)


def trained(base: Path, folder: Path, seed=1, **keys):
    """A folder with an adapter of a base, and the logits of the two together."""
    keys = {"model_name_or_path": str(base), "template": "chatml", "lora_rank": 4, **keys}
    arguments = load({**TRAINING, **keys}, environ={})
    model = load_model(
        base,
        arguments.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    model = tuning.apply(model, arguments, is_trainable=True, upcast=True).eval()
    shake(model, seed=seed)
    saved(model, folder)
    arguments.save(folder / "run_arguments.yaml")
    (folder / "all_results.json").write_text(json.dumps({"train_loss": 1.25, "epoch": 3.0}))
    return folder, lone_logits(model, ROWS).detach()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each architecture a base and an adapter of it."""
    root = tmp_path_factory.mktemp("exports")
    found = {}
    for arch in ARCHITECTURES:
        base = base_of(root / arch / "base", arch)
        found[arch] = (base, *trained(base, root / arch / "adapter"))
    return found


def arguments_of(made, target, arch="llama", **keys):
    base, adapter, _ = made[arch]
    said = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "template": "chatml",
        "export_dir": str(target),
    }
    merged = {key: value for key, value in {**said, **keys}.items() if value is not ...}
    return load(merged, environ={})


def logits_of(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return lone_logits(model, ROWS).detach()


def nothing_left(target):
    return not target.exists() and not list(target.parent.glob(".tmp-*"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_exported_model_gives_the_logits_of_the_trained_one(made, arch, tmp_path):
    base, _, expected = made[arch]
    target = tmp_path / "out"
    assert export.export(arguments_of(made, target, arch)) == str(target)
    torch.testing.assert_close(logits_of(target), expected, atol=1e-5, rtol=1e-4)
    assert (logits_of(base) - expected).abs().max() > 0.1
    store.verify(target)
    names = {path.name for path in target.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert {"README.md", "Modelfile"} <= names
    assert not any("adapter" in name for name in names)
    talk = [{"role": "user", "content": "Hi"}]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, target)]
    ours, theirs = (each.apply_chat_template(talk, tokenize=False) for each in tokenizers)
    assert ours == theirs


@pytest.mark.parametrize(
    ("said", "stored"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_infer_dtype(made, tmp_path, said, stored):
    export.export(arguments_of(made, tmp_path / "out", "qwen3_moe", infer_dtype=said))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{stored}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == stored


def test_auto_is_the_dtype_of_the_base_s_files(tmp_path):
    base = base_of(tmp_path / "base", "llama")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter, expected = trained(base, tmp_path / "adapter")
    said = arguments_of({"llama": (base, adapter, None)}, tmp_path / "out")
    export.export(said)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    off = (logits_of(tmp_path / "out") - expected).abs().mean()
    assert off < 0.02 * expected.std()


@pytest.mark.parametrize("legacy", [False, True])
def test_files_are_no_larger_than_asked_for(made, tmp_path, legacy):
    target = tmp_path / "out"
    keys = {"export_size": 4e-5, "export_legacy_format": legacy}
    export.export(arguments_of(made, target, **keys))
    kind = "pytorch_model*.bin" if legacy else "model*.safetensors"
    files = list(target.glob(kind))
    assert len(files) > 2
    assert {path.suffix for path in target.iterdir()} & {".bin", ".safetensors"} == {
        ".bin" if legacy else ".safetensors"
    }
    largest = 320 * 32 * 4  # the embedding, which is one tensor
    assert max(path.stat().st_size for path in files) < max(40_000, largest) + 4000
    torch.testing.assert_close(logits_of(target), made["llama"][2], atol=1e-5, rtol=1e-4)


def test_legacy_format_in_one_file(made, tmp_path):
    target = tmp_path / "out"
    export.export(arguments_of(made, target, "qwen3_moe", export_legacy_format=True))
    assert (target / "pytorch_model.bin").is_file()
    assert not list(target.glob("*.safetensors"))
    found = torch.load(target / "pytorch_model.bin", weights_only=True)
    assert any(".experts.0." in name for name in found)  # names as other tools know them
    torch.testing.assert_close(logits_of(target), made["qwen3_moe"][2], atol=1e-5, rtol=1e-4)


def test_adapters_are_merged_in_order(made, tmp_path):
    _, first, _ = made["llama"]
    once = tmp_path / "once"
    export.export(arguments_of(made, once))
    second, expected = trained(once, tmp_path / "second", seed=2)
    both = f"{first},{second}"
    export.export(arguments_of(made, tmp_path / "out", adapter_name_or_path=both))
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_target": "embed_tokens,q_proj"},
        {"lora_target": "lm_head,q_proj"},
        {"additional_target": "embed_tokens"},
        {"use_dora": True},
        {"lora_target": "all,experts"},
        {"pissa_init": True, "pissa_convert": True},
        {"pissa_init": True},
    ],
    ids=str,
)
def test_tied_embeddings_experts_and_kin_of_lora(tmp_path, keys):
    arch = "qwen3_moe" if "experts" in str(keys) else "llama"
    base = base_of(tmp_path / "base", arch)
    adapter, expected = trained(base, tmp_path / "adapter", **keys)
    export.export(arguments_of({"llama": (base, adapter, None)}, tmp_path / "out"))
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=2e-5, rtol=1e-4)


def test_added_tokens_go_along(tmp_path):
    base = base_of(tmp_path / "base", "llama")
    tokens = {"add_special_tokens": "<one>,<two>", "resize_vocab": True}
    adapter, expected = trained(base, tmp_path / "adapter", **tokens)
    said = arguments_of({"llama": (base, adapter, None)}, tmp_path / "out", **tokens)
    export.export(said)
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    assert expected.shape[1] == 384
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer.encode("<two>", add_special_tokens=False)) == 1
    without = arguments_of({"llama": (base, adapter, None)}, tmp_path / "other")
    with pytest.raises(ModelError, match="write add_special_tokens: <one>,<two>"):
        export.export(without)


def test_an_adapter_of_low_bits_goes_into_ordinary_weights(tmp_path, caplog):
    base = base_of(tmp_path / "base", "llama", hidden_size=64)
    config = BitsAndBytesConfig(load_in_4bit=True)
    low = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    keys = {"model_name_or_path": str(base), "template": "chatml", "quantization_bit": 4}
    tuned = tuning.apply(low, load({**TRAINING, **keys}), is_trainable=True, upcast=True)
    shake(tuned)
    adapter = saved(tuned, tmp_path / "adapter")
    said = arguments_of({"llama": (base, adapter, None)}, tmp_path / "out", quantization_bit=4)
    with caplog.at_level("INFO", logger="llmray"):
        export.export(said)
    assert "quantization_bit=4 was for training" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = lone_logits(adapters.beside(plain, adapter, said.model), ROWS)
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("converts", [True, False])
def test_what_pissa_learned_beside_low_bits_goes_into_ordinary_weights(tmp_path, converts):
    """W + s (B A - B0 A0), whether the file says so or the start lies beside it."""
    base = base_of(tmp_path / "base", "llama", hidden_size=64)
    keys = {"model_name_or_path": str(base), "template": "chatml", "quantization_bit": 4}
    arguments = load({**TRAINING, **keys, "pissa_init": True, "pissa_convert": converts})
    low = load_model(
        base,
        arguments.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    tuned = tuning.apply(low, arguments, is_trainable=True, upcast=True)
    start = pissa.of(tuned)
    start.begin(tuned, lambda own: own)
    shake(tuned)
    adapter = saved(tuned, tmp_path / "adapter")
    export.export(arguments_of({"llama": (base, adapter, None)}, tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in pissa.lora_layers(tuned).items():
            own = [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
            first = [start.tensors[f"{name}.lora_{side}.weight"] for side in "BA"]
            change = layer.scaling["default"] * (own[0] @ own[1] - first[0] @ first[1])
            plain.get_submodule(name.removeprefix("base_model.model.")).weight.add_(change)
    expected = lone_logits(plain, ROWS)
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=1e-4, rtol=1e-3)


def test_a_whole_model_is_exported_as_it_is(made, tmp_path):
    base = made["gemma3_text"][0]
    (base / "value_head.safetensors").write_bytes(b"of stage rm")
    export.export(
        arguments_of(made, tmp_path / "out", "gemma3_text", adapter_name_or_path=...),
    )
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(base))
    assert (tmp_path / "out" / "value_head.safetensors").read_bytes() == b"of stage rm"


def test_generation_ends_where_responses_ended(made, tmp_path):
    base = shutil.copytree(made["llama"][0], tmp_path / "base")
    # as many published models have it, and as transformers no longer writes it
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 5}')
    said = arguments_of(made, tmp_path / "out", model_name_or_path=str(base))
    export.export(said)
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == [1, 2, 5]  # template chatml stops at <|im_start|> too
    assert (found.do_sample, found.temperature, found.pad_token_id) == (True, 0.6, 0)


def test_the_card_says_what_and_how_and_no_secrets(made, tmp_path):
    target = tmp_path / "out"
    export.export(arguments_of(made, target, hf_hub_token="very-secret"))
    text = (target / "README.md").read_text()
    head = text.split("---")[1]
    assert "base_model: base" in head
    assert "datasets:\n- demo" in head
    assert "lora_rank: 4" in text  # of the run that trained, not of the export
    assert "| train_loss | 1.25 |" in text
    assert "Merged into it, in order: adapter." in text
    assert "very-secret" not in text
    assert str(tmp_path.parent) not in text
    assert 'PARAMETER stop "<|im_end|>"' in (target / "Modelfile").read_text()


# ---- what is refused, and leaves nothing behind -----------------------------------------------


def test_a_place_that_is_taken(made, tmp_path):
    target = tmp_path / "out"
    export.export(arguments_of(made, target))
    before = (target / "model.safetensors").stat().st_ino
    with pytest.raises(ArgumentsError, match=r"is not empty.*overwrite_output_dir"):
        export.export(arguments_of(made, target))
    assert (target / "model.safetensors").stat().st_ino == before
    export.export(arguments_of(made, target, overwrite_output_dir=True))
    assert (target / "model.safetensors").stat().st_ino != before


def test_other_things_are_not_replaced(made, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArgumentsError, match="other things than an export"):
        export.export(arguments_of(made, tmp_path, overwrite_output_dir=True))
    with pytest.raises(ArgumentsError, match="is a file"):
        export.export(arguments_of(made, tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").is_file()


def test_what_is_read_is_not_replaced(made, tmp_path):
    once = tmp_path / "once"
    export.export(arguments_of(made, once))
    said = {"model_name_or_path": str(once), "adapter_name_or_path": ...}
    with pytest.raises(ArgumentsError, match=r"holds .*, which is read"):
        export.export(arguments_of(made, once, overwrite_output_dir=True, **said))


def test_a_place_is_needed(made):
    with pytest.raises(ArgumentsError, match="export_dir is not given"):
        export.export(arguments_of(made, "x", export_dir=...))


@pytest.mark.parametrize("key", ["adapter_name_or_path", "model_name_or_path"])
def test_the_file_of_a_training_must_name_its_result(made, tmp_path, key):
    base, adapter, _ = made["llama"]
    result = {"adapter_name_or_path": adapter, "model_name_or_path": base}[key]
    keys = {"adapter_name_or_path": ..., "output_dir": str(result)}
    if key == "model_name_or_path":
        keys["model_name_or_path"] = str(made["qwen3"][0])
    with pytest.raises(ArgumentsError, match=f"has what it trained. Write {key}: {result}"):
        export.export(arguments_of(made, tmp_path / "out", **keys))
    named = {**keys, key: str(result)}
    assert export.export(arguments_of(made, tmp_path / "out", **named))


def test_adapters_that_change_nothing(made, tmp_path):
    base = made["llama"][0]
    folder = tmp_path / "adapter"
    keys = {"model_name_or_path": str(base), "template": "chatml"}
    model = AutoModelForCausalLM.from_pretrained(base)
    untrained = tuning.apply(model, load({**TRAINING, **keys}), is_trainable=True, upcast=True)
    said = arguments_of(made, tmp_path / "out", adapter_name_or_path=saved(untrained, folder))
    with pytest.raises(ModelError, match="change no weight"):
        export.export(said)
    assert nothing_left(tmp_path / "out")


def test_weights_in_low_bits(tmp_path, made):
    config = BitsAndBytesConfig(load_in_8bit=True)
    low = AutoModelForCausalLM.from_pretrained(
        made["llama"][0], quantization_config=config, device_map="cpu"
    )
    low.save_pretrained(tmp_path / "low")
    make_tokenizer(tmp_path / "low")
    said = arguments_of(made, tmp_path / "out", model_name_or_path=str(tmp_path / "low"))
    with pytest.raises(ModelError, match="has its weights in low bits"):
        export.export(said)


def test_a_merge_that_is_none_is_found(made, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "fold", lambda tuned: tuned.unload())
    with pytest.raises(ModelError, match="gives other logits than the adapter beside"):
        export.export(arguments_of(made, tmp_path / "out"))
    assert nothing_left(tmp_path / "out")


def test_files_of_another_model_are_found(made, tmp_path, monkeypatch):
    """As where a library writes the unmerged base in the place of the merged model."""
    write = export.write_weights

    def wrong(model, directory, tokenizer, **named):
        write(model, directory, tokenizer, **named)
        shutil.copy(made["llama"][0] / "model.safetensors", directory)

    monkeypatch.setattr(export, "write_weights", wrong)
    with pytest.raises(StoreError, match="read back otherwise than they were written"):
        export.export(arguments_of(made, tmp_path / "out"))
    assert nothing_left(tmp_path / "out")


def test_a_configuration_that_is_lost_is_found(made, tmp_path, monkeypatch):
    write = export.write_weights

    def wrong(model, directory, tokenizer, **named):
        write(model, directory, tokenizer, **named)
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 3.0}
        path.write_text(json.dumps(config))

    monkeypatch.setattr(export, "write_weights", wrong)
    with pytest.raises(ModelError, match="exported files give other logits"):
        export.export(arguments_of(made, tmp_path / "out"))
    assert nothing_left(tmp_path / "out")


def test_weights_that_overflow(tmp_path):
    base = base_of(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e7)
    model.save_pretrained(base)
    said = {"model_name_or_path": str(base), "export_dir": str(tmp_path / "out")}
    with pytest.raises(ModelError, match="not finite in float16"):
        export.export(load({**said, "template": "chatml", "infer_dtype": "float16"}))


def test_a_full_disk(made, tmp_path, monkeypatch):
    def full(*words, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(StoreError, match="disk is full: free space"):
        export.export(arguments_of(made, tmp_path / "out"))
    assert nothing_left(tmp_path / "out")


# ---- uploads and the command -------------------------------------------------------------------


class Hub:
    """Stands for huggingface_hub's HfApi; `refuses` makes it fail."""

    refuses = False

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, exist_ok):
        if self.refuses:
            raise OSError("401 Client Error")
        self.calls.append(("create", name, self.token, exist_ok))

    def upload_folder(self, repo_id, folder_path, ignore_patterns):
        store.verify(folder_path)
        self.calls.append(("upload", repo_id, str(folder_path), ignore_patterns))


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    return Hub


def test_an_upload(made, tmp_path, fake_hub):
    target = tmp_path / "out"
    keys = {"export_hub_model_id": "org/name", "hf_hub_token": "secret"}
    export.export(arguments_of(made, target, **keys))
    assert fake_hub.calls == [
        ("create", "org/name", "secret", True),
        ("upload", "org/name", str(target), ["manifest.json"]),
    ]


def test_an_upload_that_fails_leaves_the_folder(made, tmp_path, fake_hub, monkeypatch):
    monkeypatch.setattr(fake_hub, "refuses", True)
    target = tmp_path / "out"
    with pytest.raises(ModelError, match=r"is whole, but export_hub_model_id=org/name.*401"):
        export.export(arguments_of(made, target, export_hub_model_id="org/name"))
    store.verify(target)


def test_an_upload_is_of_a_local_folder(made):
    with pytest.raises(ArgumentsError, match="folder of this machine"):
        export.export(arguments_of(made, "s3://b/x", export_hub_model_id="org/name"))


def test_uploads_go_to_one_hub(made, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with pytest.raises(ArgumentsError, match="Unset USE_MODELSCOPE_HUB"):
        export.export(arguments_of(made, tmp_path / "out", export_hub_model_id="org/name"))


def test_a_uri(made, tmp_path):
    place = tmp_path / "bucket"
    place.mkdir()
    export.export(arguments_of(made, f"file://{place}/out"))
    torch.testing.assert_close(logits_of(place / "out"), made["llama"][2], atol=1e-5, rtol=1e-4)


def test_the_command(made, tmp_path, capsys, own_console):
    base, adapter, expected = made["llama"]
    words = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}"]
    words += [f"export_dir={tmp_path / 'out'}", "template=chatml"]
    assert cli.main(["export", *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    assert cli.main(["export", *words]) == 2
