"""What the benchmarks of stage ppo run on: a Llama of 2.9 M random weights, made on the spot.

Its special tokens have no chance to be drawn, so every response is as long as it may be, in
whatever program samples it. Files are written by hand, as old and new libraries read them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 192, 512, 6, 6, 640
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LEAST_WORDS, MOST_WORDS = 6, 48  # of a prompt; the template adds about ten tokens
SYLLABLES = ["ba", "di", "go", "ku", "le", "ma", "no", "ri", "su", "ta", "ve", "zo"]


def make_model(folder: Path, seed: int, *, scores: bool = False) -> Path:
    """A folder with a causal model and its tokenizer, and a value head where it `scores`."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(_config(), indent=2) + "\n")
    draw = torch.Generator().manual_seed(seed)
    weights = _weights(draw)
    # some libraries take files without it for those of another framework
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if scores:
        head = torch.randn(1, WIDTH, generator=draw) / WIDTH**0.5
        names = {"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}
        save_file(names, folder / "value_head.safetensors", {"format": "pt"})
    return folder


def make_prompts(folder: Path, count: int) -> Path:
    """A folder with the data set `prompts`, of `count` rows of different lengths."""
    folder.mkdir(parents=True)
    draw, words = np.random.default_rng(0), _words()
    lengths = draw.integers(LEAST_WORDS, MOST_WORDS + 1, count)
    rows = [
        {"instruction": " ".join(draw.choice(words, length)), "input": "", "output": "ba"}
        for length in lengths
    ]
    (folder / "prompts.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(
        json.dumps({"prompts": {"file_name": "prompts.json"}})
    )
    return folder


def _words() -> list[str]:
    return [first + second for first in SYLLABLES for second in SYLLABLES]


def _write_tokenizer(folder: Path) -> None:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    bare.train_from_iterator([" ".join(_words()), "system user assistant"] * 2, trainer)
    bare.save(str(folder / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _weights(draw: torch.Generator) -> dict[str, torch.Tensor]:
    """All weights; along one direction that every token has, special tokens are out of reach."""

    def normal(*shape: int, deviation: float = 0.02) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * deviation

    tokens = normal(VOCABULARY, WIDTH, deviation=0.3)
    head = normal(VOCABULARY, WIDTH)
    tokens[:, 0], head[:, 0], head[: len(SPECIAL), 0] = 3.0, 0.0, -10.0
    weights = {"model.embed_tokens.weight": tokens, "lm_head.weight": head}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{at}self_attn.{name}.weight"] = normal(WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            weights[f"{at}mlp.{name}.weight"] = normal(INNER, WIDTH)
        weights[f"{at}mlp.down_proj.weight"] = normal(WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = torch.ones(WIDTH)
    weights["model.norm.weight"] = torch.ones(WIDTH)
    return weights
