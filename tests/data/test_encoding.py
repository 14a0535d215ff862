import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from bare_tokenizers import byte_level, composing, lowercase, sentencepiece_like, stripping
from letters import Letters
from tiny import make_tokenizer

from llmray.data.conversation import Conversation, Message
from llmray.data.encoding import Encoder
from llmray.data.features import FeatureOptions, RowFeatures, supervised

TOKENIZERS = [byte_level, composing, lowercase, stripping, sentencepiece_like]
PIECES = [
    "What is",
    " the capital",
    "?",
    "\n",
    "\n\n",
    " ",
    "  ",
    "<|im_start|>",
    "<|im_end|>\n",
    "user\n",
    "é",
    "e\u0301",
    "\u0958",
    "日本",
    "🐕",
    '"so"',
    ":",
    "<|mask|>",
    "A",
]


def random_parts(seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 4))) for _ in range(draw.choice([2, 4]))]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_ids_are_the_tokenizers_own_and_borders_those_of_its_offsets(make: Any) -> None:
    """Tokens that begin before a source's end are before it; those of a target end in it."""
    tokenizer = make()
    texts = [random_parts(seed) for seed in range(300)]
    encoded = Encoder(tokenizer.to_str()).encode_parts(texts)
    for i, parts in enumerate(texts):
        own = tokenizer.encode("".join(parts), add_special_tokens=False)
        first, last = encoded.bounds[i], encoded.bounds[i + 1]
        assert encoded.ids[first:last].tolist() == own.ids
        if make is not byte_level:  # offsets of other tokenizers leave blanks out
            continue
        for number, place in enumerate(accumulate(map(len, parts))):
            inside = [
                (stop <= place) if number % 2 else (start < place) for start, stop in own.offsets
            ]
            assert encoded.borders[i][number] == sum(inside)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_borders_cut_the_text_where_its_parts_end(make: Any) -> None:
    tokenizer = make()
    parts = [
        "<|im_start|>user\nWhat is the sea<|im_end|>\n<|im_start|>assistant",
        "<|im_end|>",
        "<|im_start|>user\nDog<|im_end|><|im_start|>",
        "fox<|im_end|>",
    ]
    encoded = Encoder(tokenizer.to_str()).encode_parts([["a", "b"], parts])
    ids = encoded.ids[encoded.bounds[1] :].tolist()
    [_, borders] = encoded.borders
    cut = [ids[start:stop] for start, stop in zip([0, *borders], borders, strict=False)]
    end = tokenizer.token_to_id("<|im_end|>")
    start = tokenizer.token_to_id("<|im_start|>")
    assert cut[1] == [end]
    assert cut[2][0] == start
    assert cut[2][-1] == start
    assert cut[3][-1] == end
    written = tokenizer.decode(cut[3], skip_special_tokens=False)
    assert written.replace("\u2581", "").replace(" ", "") == parts[3]


def test_a_token_over_the_end_of_a_part_belongs_to_the_source() -> None:
    tokenizer = byte_level()
    straddling = tokenizer.encode(': "')
    assert len(straddling.ids) < 3  # ' "' is one token
    encoder = Encoder(tokenizer.to_str())
    # the source ends inside a token; then the target ends inside one
    assert encoder.encode_parts([["said: ", '"so"']]).borders[0][0] == len(
        tokenizer.encode('said: "').ids
    )
    [borders] = encoder.encode_parts([["said", ": ", '"so"', "."]]).borders
    assert borders[1] == len(tokenizer.encode("said:").ids)


def test_a_token_of_prompt_and_response_is_not_learned() -> None:
    """Of 'said: "so"' the response begins within the token ' "': it is the prompt's."""
    tokenizer = byte_level()
    said = (Message("user", "said: "), Message("assistant", '"so"'))
    [row] = supervised(
        [Conversation(said)], Encoder(tokenizer.to_str()), Letters(), FeatureOptions(cutoff_len=64)
    )
    assert isinstance(row, RowFeatures)
    assert row.input_ids.tolist() == tokenizer.encode('said: "so"').ids
    start, stop = row.targets
    tokens = [tokenizer.decode([token]) for token in row.input_ids.tolist()]
    assert "".join(tokens[start:stop]) == 'so"'
    assert tokens[start - 1] == ' "'


def test_an_empty_text_has_no_tokens() -> None:
    encoded = Encoder(byte_level().to_str()).encode_parts([["", ""], ["a", "b"]])
    assert encoded.bounds.tolist()[:2] == [0, 0]
    assert encoded.borders[0] == [0, 0]


def test_nothing_is_added_or_cut(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path)
    backend = made.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    raw = json.loads(backend.to_str())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    ids, bounds = Encoder(json.dumps(raw)).encode(["The quick brown fox jumps", ""])
    assert backend.decode(ids.tolist()) == "The quick brown fox jumps"
    assert bounds.tolist() == [0, len(ids), len(ids)]
