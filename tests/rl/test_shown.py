"""What is seen of rollouts: prompts of a table, lines of samples, held-out prompts, scorers."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_policy import CPU, SAMPLING, collector, policy, ppo, prompts, rewards

from llmray.data import spoken
from llmray.data.batches import Batches
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.shards import Sample
from llmray.errors import DataError, RewardError
from llmray.rl import figures
from llmray.rl.experience import Phases
from llmray.rl.handles import Answer
from llmray.rl.held_out import judge
from llmray.rl.prompts import PromptReader, prompts_of
from llmray.rl.reward_model import ModelReward
from llmray.rl.rollout import Plan
from llmray.rl.rollout_log import RolloutLog


class Table:
    """Rows of a prompt of some length with a response of two tokens."""

    def __init__(self, lengths):
        self.rows = [np.arange(3, 3 + n, dtype=np.int32) for n in lengths]
        self.lengths = np.array([len(row) for row in self.rows], np.int32)
        self.num_rows = len(lengths)

    def __len__(self):
        return len(self.rows)

    def samples(self, index):
        row = self.rows[index]
        label = Message("assistant", f"{index}.")
        said = Conversation((Message("user", f"{index}?"),), label=label)
        return [Sample(row, np.zeros(len(row), bool), said=spoken.write(said))]


def reader(lengths, per_device=2, world_size=1, rank=0):
    table = Table(lengths)
    batches = Batches(table.lengths, per_device, 2, world_size, rank, seed=0, order="random")
    world = replace(CPU, world_size=world_size, rank=rank)
    return PromptReader(table, batches, per_device * world_size, world)


def test_prompts_of_a_step_over_ranks():
    """Ten rows, four a step: three steps see each row once, on one rank as on two."""
    lengths = [3, 5, 2, 7, 4, 6, 1, 8, 2, 3]
    alone = reader(lengths)
    pair = [reader(lengths, per_device=1, world_size=2, rank=rank) for rank in (0, 1)]
    for step in range(5):
        whole = {(p.row, p.place, tuple(p.ids), p.label) for p in alone(step)}
        shares = [of(step) for of in pair]
        parts = [(p.row, p.place, tuple(p.ids), p.label) for share in shares for p in share]
        assert len(parts) == len(whole)
        assert set(parts) == whole
        assert len(shares[0]) == len(shares[1])
        assert sorted(place for _, place, _, _ in parts) == list(range(len(parts)))
        assert all(len(ids) == lengths[row] and label == f"{row}." for row, _, ids, label in whole)
    rows = [prompt.row for step in range(3) for prompt in alone(step)]
    assert sorted(rows) == list(range(10))
    position = alone.batches.state_dict()
    assert (position["epoch"], position["step"]) == (1, 0)
    assert [p.row for p in prompts_of(Table(lengths), 1, 3)] == [1, 4, 7]


def test_a_row_without_a_prompt_is_named():
    with pytest.raises(DataError, match="row 1 of the data set, counted from 0, has no prompt"):
        prompts_of(Table([3, 0]), 0, 1)


def test_samples_of_rollouts_are_written_every_so_often(tmp_path):
    def partly(asked, responses):
        return [math.nan] + [float(len(response)) for response in responses[1:]]

    sources = [rewards(partly, on_error="mask", max_attempts=1), rewards(name="share", weight=0.0)]
    sources[0] = type(sources[0])("length", 1.0, sources[0].pool)
    of = ppo(policy(), sources)
    of.show = RolloutLog(tmp_path, every=2)
    for step in range(3):
        of(step)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 8 + [3] * 8
    first = lines[0]
    assert set(first) == {
        *("step", "id", "prompt", "response", "score", "kl", "tokens", "ended", "parts"),
    }
    assert first["id"] == "ppo-0-0-0"
    scored = [line for line in lines if line["score"] is not None]
    assert all(line["score"] == len(line["response"]) for line in scored)
    assert all(set(line["parts"]) == {"length", "share"} for line in lines)


def test_held_out_prompts_are_judged_alike_at_every_evaluation():
    engine = policy()
    held = collector(engine, [rewards()], Plan(SAMPLING, name="eval"))
    tables = {"eval": prompts(12), "eval_other": prompts(5, seed=3)}
    found = judge(held, tables, "k1", CPU)
    assert found == judge(held, tables, "k1", CPU)
    assert set(found) == {
        f"{table}_{name}"
        for table in tables
        for name in ("score", "score_deviation", "kl", "response_length", "without_eos")
    }
    assert found["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    before = torch.cat([p.flatten() for p in engine.model.parameters()]).clone()
    of = ppo(engine, [rewards()])
    for step in range(6):
        of(step)
    after = judge(held, tables, "k1", CPU)
    assert after["eval_score"] > found["eval_score"]
    assert after["eval_kl"] > 1e-3
    assert not torch.equal(before, torch.cat([p.flatten() for p in engine.model.parameters()]))


def test_sets_that_are_judged_one_by_one_are_judged_together_too():
    """Sets of 12 and 5 responses, of which 17 in one table have the same figures."""
    engine = policy()
    held = collector(engine, [rewards()], Plan(SAMPLING, name="eval"))
    whole = prompts(17)
    parts = {"eval_a": whole[:12], "eval_b": whole[12:]}
    found = judge(held, parts, "k1", CPU)
    expected = judge(held, {"eval": whole}, "k1", CPU)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    assert found["eval_a_score"] != found["eval_b_score"]


def test_held_out_prompts_without_any_score():
    held = collector(
        policy(), [rewards(lambda p, r: [math.nan] * len(r), on_error="mask", max_attempts=1)]
    )
    with pytest.raises(RewardError, match="none of the 4 responses to eval has a score"):
        judge(held, {"eval": prompts(4)}, "k1", CPU)


class Encoded:
    def __init__(self, ids, is_cut=False):
        self.ids, self.is_cut = np.array(ids, np.int32), is_cut


class Words:
    """A scorer whose tokens are words, at most five, and whose reward is their number."""

    def encode(self, texts):
        counts = [len(text.split()) for text in texts]
        return [Encoded(range(min(5, count)), count > 5) for count in counts]

    def encode_conversations(self, conversations, *, allows_empty=False):
        assert allows_empty
        whole = [" ".join(message.content for message in one.messages) for one in conversations]
        return [RowError("a wug is no word.") if "wug" in t else self.encode([t])[0] for t in whole]

    def run(self, sequences):
        return [float(len(ids)) for ids in sequences]


def test_a_reward_model_reads_whole_texts():
    of = ModelReward(Words())
    asked = [Answer("0", "p", "r", "<s> p r </s>"), Answer("1", "p", "", "p")]
    assert of.score(asked) == [4.0, 1.0]
    with pytest.raises(RewardError, match="answer 2 has no token"):
        of.score([*asked, Answer("2", "", "", "")])
    with pytest.raises(RewardError, match="answer 2 is longer than the 5 tokens"):
        of.score([*asked, Answer("2", "", "", "a b c d e f")])


def test_a_reward_model_reads_conversations():
    def answer(prompt, response):
        said = Message("user", prompt), Message("assistant", response)
        return Answer("7", "", "", "not read", conversation=Conversation(said))

    of = ModelReward(Words(), "conversation")
    assert of.score([answer("a b", "c"), answer("a", "")]) == [3.0, 1.0]
    with pytest.raises(RewardError, match=r"answer 7 cannot be written in .*: a wug is no word"):
        of.score([answer("a", "wug")])


def test_idle_share_of_what_scores():
    """Two that score for 10 s each could do 20 s; they did 5, for all ranks together."""
    found = SimpleNamespace(phases=Phases(rollout=6.0, update=4.0))
    assert figures.idle_share(found, 5.0, 2.0, CPU) == pytest.approx(0.75)
    assert figures.idle_share(found, 25.0, 2.0, CPU) == 0.0
