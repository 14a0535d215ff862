"""What is written can be read by transformers alone, and gives the same logits."""

import json
import os
import stat

import pytest
import torch
from layouts import lone_logits, make_rows
from tiny import build_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmray.model import export
from llmray.model.attention import FLAT
from llmray.model.head import TokenModel


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_a_whole_model_reloads_to_the_same_logits(arch, tmp_path, capfd):
    model, rows = build_model(arch, amplify=3.0), make_rows()
    own = model.config._attn_implementation
    expected = lone_logits(model, rows.sequences)
    TokenModel(model, flat=True)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    export.write_weights(model, tmp_path / "out", tokenizer)

    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert FLAT not in (tmp_path / "out" / "config.json").read_text()
    assert model.config._attn_implementation == FLAT
    assert capfd.readouterr().err == ""
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert again.config._attn_implementation == own
    assert torch.equal(lone_logits(again, rows.sequences), expected)
    text = [{"role": "user", "content": "Hi"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(text)
    assert theirs["input_ids"] == tokenizer.apply_chat_template(text)["input_ids"]


def test_weights_are_written_in_the_dtype_asked_for(tmp_path):
    model = build_model()
    export.write_weights(model, tmp_path, make_tokenizer(tmp_path), dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.bfloat16())
    assert model.dtype == torch.float32


def test_others_may_read_the_files_as_the_umask_says(tmp_path):
    script = tmp_path / "out" / "sweep.sh"
    script.parent.mkdir()
    script.touch(0o700)
    old = os.umask(0o027)
    try:
        export.write_weights(build_model(), tmp_path / "out", make_tokenizer(tmp_path))
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in script.parent.iterdir()}
    assert modes.pop("sweep.sh") == 0o700
    assert set(modes.values()) == {0o640}
