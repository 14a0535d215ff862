"""Rewards of texts and conversations: against lone forward passes, in any company and layout."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from tiny import SIZES, build_model, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from llmray.arguments.loading import load
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.features import FEATURES
from llmray.errors import DataError, ModelError, RewardError
from llmray.model import value_head
from llmray.model.load import load_model
from llmray.train import score as scoring
from llmray.train.batcher import Batcher, Busy
from llmray.train.score import Scorer

TEXTS = ["<|im_start|>user\nhi<|im_end|>\n", "What is the capital of France?", "a", "the sea " * 30]


def arguments(model, **keys):
    base = {"model_name_or_path": str(model), "infer_dtype": "float32", "use_cpu": True}
    return load({**base, "template": "chatml", **keys}, environ={})


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    make_tokenizer(directory)
    make_model(directory, amplify=3.0)
    value_head.write(value_head.create(build_model(), 0), directory)
    return directory


def make_classifier(directory, *, labels=1, pad=True):
    tokenizer = make_tokenizer(directory)
    sizes = {**SIZES, "pad_token_id": 0 if pad else None}
    config = AutoConfig.for_model("llama", **sizes, num_labels=labels)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(directory)
    return model, tokenizer


def lone_scores(directory, texts):
    """Each text alone, by transformers' own forward and the head's two tensors."""
    run = arguments(directory)
    model = load_model(
        directory,
        run.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
    )
    head = value_head.load(directory, model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores.append(head(model.base_model(ids).last_hidden_state[:, -1]).item())
    return scores


def test_scores_are_those_of_lone_texts(reward_dir, monkeypatch):
    scorer = Scorer.load(arguments(reward_dir))
    expected = lone_scores(reward_dir, TEXTS)
    assert np.std(expected) > 0.1
    assert scorer.score(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert scorer.score(TEXTS[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert scorer.score([]) == []


def test_a_padded_model_scores_alike(tmp_path):
    make_tokenizer(tmp_path)
    make_model(tmp_path, "falcon_h1", amplify=2.0)
    value_head.write(value_head.create(build_model(), 0), tmp_path)
    scorer = Scorer.load(arguments(tmp_path))
    assert not scorer.forward.is_flat
    assert scorer.score(TEXTS) == pytest.approx(lone_scores(tmp_path, TEXTS), abs=1e-4)


@pytest.mark.parametrize("is_flat", [True, False])
def test_forward_passes_keep_the_budget(is_flat):
    """Of 10 tokens: flat rows hold 4 + 3 + 2, then 9, then 12 alone; padded ones no more cells."""
    seen = []

    class Lengths:
        def __call__(self, sequences):
            seen.append([len(ids) for ids in sequences])
            return torch.tensor(seen[-1], dtype=torch.float32)

    forward = Lengths()
    forward.is_flat = is_flat
    scorer = Scorer(forward, None, None, None, None, max_tokens=10)
    lengths = [4, 3, 2, 9, 12, 1]
    found = scorer.run([np.zeros(length, np.int32) for length in lengths])
    assert found == lengths
    assert seen == ([[4, 3, 2], [9], [12], [1]] if is_flat else [[12], [9], [4, 3], [2, 1]])


def dialogue(response, *, question="What is the capital of France?"):
    return Conversation((Message("user", question), Message("assistant", response)))


def test_a_conversation_is_scored_as_its_text_in_the_template(reward_dir):
    scorer = Scorer.load(arguments(reward_dir, default_system="Be brief."))
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis.<|im_end|>\n"
    )
    assert scorer.score_conversations([dialogue("Paris.")]) == scorer.score([text])


def test_answers_have_the_tokens_that_training_gives_them(reward_dir):
    scorer = Scorer.load(arguments(reward_dir))
    prompt = (Message("user", "Who?"), Message("assistant", "I."), Message("user", "And?"))
    yes, no = Message("assistant", "You."), Message("assistant", "No one.")
    pair = Conversation(prompt, "Be brief.", chosen=yes, rejected=(no,))
    [row] = FEATURES["pairwise"].build([pair], scorer.encoder, scorer.renderer, scorer.options)
    first, second = row.starts
    expected = [row.input_ids[:second], np.delete(row.input_ids, np.s_[first:second])]
    talks = [Conversation((*prompt, answer), "Be brief.") for answer in (yes, no)]
    found = [encoded.ids for encoded in scorer.encode_conversations(talks)]
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_special_tokens_that_are_said_stay_text_where_the_run_says_so(reward_dir):
    """`<|im_end|>` in a message is one token, or its letters; that of the template is a token."""
    said = dialogue("yes<|im_end|> no")
    counts = {}
    for splits in (False, True):
        scorer = Scorer.load(arguments(reward_dir, split_special_tokens=splits))
        [encoded] = scorer.encode_conversations([said])
        counts[splits] = encoded.ids.tolist().count(2)
    assert counts[False] == counts[True] + 1
    assert counts[True] >= 2


def test_half_a_character_is_named(reward_dir):
    scorer = Scorer.load(arguments(reward_dir))
    found = scorer.encode_conversations([dialogue("a\ud800"), dialogue("b")])
    assert "is half a character" in str(found[0])
    assert len(found[1].ids)


def test_conversations_that_cannot_be_scored_are_named(reward_dir):
    scorer = Scorer.load(arguments(reward_dir, cutoff_len=40, truncation="error"))
    found = scorer.encode_conversations([dialogue("yes"), dialogue("  \n"), dialogue("no " * 60)])
    assert len(found[0].ids) < 40
    assert isinstance(found[1], RowError)
    assert "the response is empty" in str(found[1])
    assert "Required: at most cutoff_len=40" in str(found[2])
    with pytest.raises(
        DataError, match=r"conversation 1 \(counted from 0\): the response is empty"
    ):
        scorer.score_conversations([dialogue("yes"), dialogue("")])
    with pytest.raises(DataError, match=r"text 1 \(counted from 0\) has no token"):
        scorer.score(["a", ""])


def test_long_texts_keep_their_start(reward_dir):
    scorer = Scorer.load(arguments(reward_dir))
    assert scorer.max_positions == 512
    [long] = scorer.encode(["a b " * 400])
    assert (len(long.ids), long.is_cut) == (512, True)
    [short] = scorer.encode(["a b " * 400], max_length=7)
    assert short.ids.tolist() == long.ids[:7].tolist()
    [whole] = scorer.encode(["a"])
    assert not whole.is_cut


def test_a_score_that_is_no_number_is_refused_by_its_number(reward_dir, monkeypatch):
    scorer = Scorer.load(arguments(reward_dir))
    monkeypatch.setattr(Scorer, "run", lambda self, sequences: [1.0, math.nan, 2.0])
    with pytest.raises(RewardError, match=r"text 1 \(counted from 0\) is nan"):
        scorer.score(["a", "b", "c"])


def test_a_model_without_a_head_is_refused(tiny_llama_dir):
    with pytest.raises(ModelError, match=r"has no value_head\.safetensors.*stage: rm"):
        Scorer.load(arguments(tiny_llama_dir))


# ---- classifiers of a hub -----------------------------------------------------------------------


@pytest.mark.parametrize("pad", [True, False])
def test_a_classifier_scores_as_transformers_does_alone(tmp_path, pad):
    """Texts end with the end-of-text token, which must not be taken for padding."""
    model, tokenizer = make_classifier(tmp_path, pad=pad)
    texts = [f"{text}<|im_end|>" for text in TEXTS]
    expected = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(ids).logits.item())
    assert np.std(expected) > 0.01
    scorer = Scorer.load(arguments(tmp_path))
    assert scorer.score(texts) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_has_its_own_chat_template(tmp_path):
    make_classifier(tmp_path)
    run = load({"model_name_or_path": str(tmp_path), "use_cpu": True}, environ={})
    scorer = Scorer.load(run)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    talk = Conversation((Message("user", "hi"), Message("assistant", "ho")))
    assert scorer.score_conversations([talk]) == scorer.score([text])


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    make_classifier(tmp_path, labels=3)
    with pytest.raises(ModelError, match="has 3 labels"):
        Scorer.load(arguments(tmp_path))


# ---- many callers -------------------------------------------------------------------------------


def ids(*numbers):
    return [np.array([number], np.int32) for number in numbers]


def test_callers_share_batches_and_take_turns():
    """While the first batch runs, two callers ask: the second batch has one of each in turn."""
    started, go, batches = Event(), Event(), []

    def run(sequences):
        batches.append([int(sequence[0]) for sequence in sequences])
        started.set()
        assert go.wait(300)
        return [float(sequence[0]) for sequence in sequences]

    batcher = Batcher(run, max_tokens=4)
    first = batcher.submit(ids(1))
    assert started.wait(300)
    many, few = batcher.submit(ids(*range(10, 15))), batcher.submit(ids(20))
    go.set()
    assert first.result(300) == [1.0]
    assert few.result(300) == [20.0]
    assert many.result(300) == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert batches == [[1], [10, 20, 11, 12], [13, 14]]
    assert (batcher.num_waiting, batcher.num_batches) == (0, 3)
    batcher.close()


def test_too_many_at_once_are_refused_and_the_gone_are_forgotten():
    started, go, seen = Event(), Event(), []

    def run(sequences):
        started.set()
        assert go.wait(300)
        seen.extend(int(sequence[0]) for sequence in sequences)
        return [0.0] * len(sequences)

    batcher = Batcher(run, max_tokens=4, max_waiting=3)
    first = batcher.submit(ids(1))
    assert started.wait(300)
    gone = batcher.submit(ids(2, 3))
    with pytest.raises(Busy, match="2 texts are waiting, and at most 3 may"):
        batcher.submit(ids(4, 5))
    kept = batcher.submit(ids(6))
    assert gone.cancel()
    go.set()
    assert kept.result(300) == [0.0]
    assert first.result(300) == [0.0]
    assert seen == [1, 6]
    assert batcher.num_waiting == 0
    assert batcher.submit([]).result(60) == []
    batcher.close()
    with pytest.raises(RewardError, match="scoring has ended"):
        batcher.submit(ids(1))


def test_a_failure_is_told_to_its_callers_and_the_next_are_served(caplog):
    def run(sequences):
        if any(sequence[0] == 13 for sequence in sequences):
            raise ValueError("thirteen")
        return [1.0] * len(sequences)

    batcher = Batcher(run, max_tokens=1)
    failed = batcher.submit(ids(12, 13, 14))
    with pytest.raises(ValueError, match="thirteen"):
        failed.result(300)
    assert batcher.submit(ids(1)).result(300) == [1.0]
    assert "scoring failed: ValueError: thirteen" in caplog.text
    batcher.close()


def test_many_threads_get_their_own_scores(reward_dir):
    scorer = Scorer.load(arguments(reward_dir))
    texts = [f"text number {number}" for number in range(60)]
    expected = scorer.score(texts)
    batcher = Batcher(scorer.run, max_tokens=200)

    def ask(text):
        return batcher.submit([scorer.encode([text])[0].ids]).result(300)[0]

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, texts)) == pytest.approx(expected, abs=1e-5)
    assert batcher.num_batches < 60
    batcher.close()


def test_the_budget_covers_the_longest_conversation(reward_dir):
    assert Scorer.load(arguments(reward_dir, cutoff_len=9000)).max_tokens == 9000
    assert Scorer.load(arguments(reward_dir)).max_tokens == scoring.MAX_TOKENS["cpu"]
