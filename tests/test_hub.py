"""Names and paths to folders; GGUF files converted once, by one process."""

import json
import logging
import multiprocessing
import shutil

import gguf
import pytest
import torch
from tiny import build_model, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmray import hub, store
from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def write_gguf(path, *, eos=2, pad=0):
    """A tiny llama in llama.cpp's format: names of its own, q and k permuted, tokenizer inside."""
    model, tokenizer = build_model(), make_tokenizer(path.parent / "tokenizer")
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if index < 3 else 1 for _, index in tokens])
    writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(pad)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, number in heads.items():
            if part in name:
                halves = tensor.view(number, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def resolve(name, **settings):
    return hub.resolve(name, ModelArguments(), **settings)


def test_a_folder_is_itself(tiny_llama_dir):
    assert resolve(str(tiny_llama_dir)) == tiny_llama_dir


def test_a_gguf_file_is_converted_once(tmp_path, cache, caplog, capfd):
    path = write_gguf(tmp_path / "tiny.gguf")
    with caplog.at_level(logging.INFO, "llmray"):
        first = resolve(path)
        assert caplog.text.count("converting") == 1
        assert resolve(str(path)) == first
        assert caplog.text.count("converting") == 1
    store.verify(first)
    assert capfd.readouterr().err == ""

    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    expected = build_model().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(first)
    original = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = "<|im_start|>user\nWhat is the capital, naïve?<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer.chat_template == original.chat_template


def test_eos_and_pad_are_those_of_the_files_metadata(tmp_path, cache):
    tokenizer = AutoTokenizer.from_pretrained(
        resolve(write_gguf(tmp_path / "odd.gguf", eos=1, pad=2))
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path, cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_gguf(folder / "tiny.gguf")
    assert resolve(folder) == resolve(path)
    shutil.copy(path, folder / "other.gguf")
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        resolve(folder)


def test_a_changed_gguf_file_is_converted_anew(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    first = resolve(path)
    write_gguf(path, eos=1)
    assert resolve(path) != first


def test_processes_that_come_together_convert_once(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        one, other = pool.map(resolve, [path, path])
    assert one == other
    assert [p.name for p in (cache / "models").iterdir() if p.suffix != ".lock"] == [one.name]


@pytest.mark.parametrize("size", [0, 3, 4000, 20000, -100])
def test_a_gguf_file_cut_short(tmp_path, cache, size):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="cannot be converted"):
        resolve(path)
    left = [p.name for p in (cache / "models").iterdir() if p.suffix != ".lock"]
    assert left == []


def test_a_gguf_file_of_an_unknown_architecture(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(ModelError, match=r"cannot be converted: .*lhama.*that transformers reads"):
        resolve(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "model_name_or_path is missing"),
        ("/no/such/folder", "there is no such folder"),
        ("./nor/this", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
    ],
)
def test_names_that_are_nothing(name, message):
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path, cache):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ModelArguments(cache_dir=str(tmp_path))
    with pytest.raises(
        ModelError,
        match=r"no-such/model: .* the Hugging Face hub gave none",
    ):
        hub.resolve("no-such/model", arguments)


def test_a_snapshot_that_is_in_the_hubs_cache_needs_no_network(monkeypatch, tmp_path, cache):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    make_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "branch").write_text("abc")
    arguments = ModelArguments(cache_dir=str(tmp_path), model_revision="branch")
    assert hub.resolve("org/tiny", arguments) == repository / "snapshots" / "abc"


def test_an_adapter_in_a_folder_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--adapters"
    inner = repository / "snapshots" / "abc" / "inner"
    inner.mkdir(parents=True)
    (inner / "adapter_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    arguments = ModelArguments(cache_dir=str(tmp_path), adapter_folder="inner")
    assert hub.resolve("org/adapters", arguments, kind="adapter") == inner
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        hub.resolve("org/adapters", ModelArguments(cache_dir=str(tmp_path)), kind="adapter")


@pytest.mark.parametrize("allowed", [False, True])
def test_pickled_weights_are_fetched_only_where_they_may_be_read(monkeypatch, tmp_path, allowed):
    """A repository that has no safetensors."""
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def fetch(name, key, model_args, revision, unused):
        asked.append("*.bin" not in unused)
        return tmp_path

    monkeypatch.setattr(hub.downloads, "fetch", fetch)
    keys = ModelArguments(allow_pickled_weights=allowed)
    assert hub.resolve("somebody/model", keys) == tmp_path
    assert any(asked) is allowed


def test_files_and_folders_of_the_wrong_kind(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="that goes to adapter_name_or_path"):
        resolve(tmp_path)
    assert resolve(tmp_path, kind="adapter") == tmp_path
    with pytest.raises(ModelError, match=r"is a file. A folder, a \.gguf file"):
        resolve(tmp_path / "adapter_config.json")


def test_identity_follows_the_content_and_not_the_place(tmp_path, tiny_llama_dir):
    copy = shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    assert hub.identity(copy) == hub.identity(tiny_llama_dir)
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert hub.identity(copy) != hub.identity(tiny_llama_dir)
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    shutil.copy(tiny_llama_dir / "model.safetensors", weights)
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert hub.identity(copy) != hub.identity(tiny_llama_dir)
