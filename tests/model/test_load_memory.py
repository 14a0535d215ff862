"""What loading costs in memory of a process's own: weights of a file are shared by its readers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer

CODE = """
import json, re, sys
import torch
from llmray.arguments.model import ModelArguments
from llmray.model.load import load_model

def own():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])

tiny, directory = sys.argv[1:]
def load(place, dtype):
    return load_model(place, ModelArguments(), dtype=dtype, device=torch.device("cpu"),
                      gradient_checkpointing=False)
load(tiny, torch.float32)  # imports all that loading needs
models = []
for dtype in (torch.float32, torch.bfloat16):
    before = own()
    models.append(load(directory, dtype))
    loaded = own() - before
    print("loaded", flush=True)
    sys.stdin.readline()  # the other has loaded too
    with torch.no_grad():
        models[-1](torch.arange(8)[None], use_cache=False)
    size = sum(p.numel() * p.element_size() for p in models[-1].parameters())
    print(json.dumps({"size": size, "loaded": loaded, "used": own() - before}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc has RssAnon")
def test_two_processes_hold_the_weights_of_a_file_once(tmp_path: Path) -> None:
    """Both hold them at once. In the file's dtype, float32, its pages are shared: next to nothing
    is a process's own. In bfloat16 a copy in that dtype is: at most 1.15 times its size."""
    make_tokenizer(tmp_path / "tiny")
    make_model(tmp_path / "tiny")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    make_tokenizer(tmp_path / "model")
    make_model(tmp_path / "model", vocab_size=20000, **sizes)
    command = [sys.executable, "-c", CODE, str(tmp_path / "tiny"), str(tmp_path / "model")]
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for limit in (0.15, 1.15):
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "loaded\n"
        for rank in ranks:
            assert rank.stdin is not None
            assert rank.stdout is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
            found = json.loads(rank.stdout.readline())
            assert found["size"] > 6e7, found
            assert found["loaded"] < limit * found["size"], found
            assert found["used"] < limit * found["size"] + 2e7, found
    assert [rank.wait(600) for rank in ranks] == [0, 0]
