"""Tokenizers of several kinds, trained on the spot, without anything around them."""

from typing import Any

from tiny import TEXT
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)


def byte_level(normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [*TEXT, 'He said: "so"'] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


def sentencepiece_like() -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<|im_start|>", "<|im_end|>", *bytes_],
            show_progress=False,
        ),
    )
    return made


def stripping() -> Tokenizer:
    made = byte_level()
    made.add_special_tokens([AddedToken("<|mask|>", lstrip=True, rstrip=True)])
    return made


def lowercase() -> Tokenizer:
    return byte_level(normalizers.Lowercase())


def composing() -> Tokenizer:
    return byte_level(normalizers.NFC())
