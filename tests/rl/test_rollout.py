"""Rollouts: which responses come of which prompts and seeds, as which texts and batches."""

import pytest
import torch
from toy_policy import SAMPLING, STOP, Numbers, collector, policy, prompts, rewards

from llmray.data.conversation import Conversation, Message
from llmray.rl.handles import Answer
from llmray.rl.rollout import Plan, Prompt, Rollout, Sampler, Texts
from llmray.train.generate import Response


class Script:
    """A policy that answers a prompt with its length, and keeps what it was asked."""

    def __init__(self):
        self.batches, self.seeds = [], []

    def generate(self, asked, sampling, seeds):
        self.batches.append([len(prompt) for prompt in asked])
        self.seeds += seeds
        return [
            Response([len(prompt)] * (len(prompt) % 3), STOP if len(prompt) % 2 else None)
            for prompt in asked
        ]


def sampled(plan, asked, rollout=0, of=None):
    sent = []
    sampler = Sampler(of or Script(), Texts(Numbers()), plan)
    found = sampler.sample(asked, rollout, lambda rows, answers: sent.append((rows, answers)))
    return found, sent


def test_prompts_of_like_length_are_sampled_together_and_come_back_in_order():
    script, asked = Script(), [Prompt([5] * n, row, row) for row, n in enumerate((2, 9, 4, 7))]
    found, sent = sampled(Plan(SAMPLING, num_samples=2, side_by_side=3), asked, of=script)
    assert script.batches == [[9, 9, 7], [7, 4, 4], [2, 2]]
    assert [len(p.ids) for p in found.prompts] == [2, 2, 9, 9, 4, 4, 7, 7]
    assert found.responses == [[2, 2]] * 2 + [[STOP]] * 2 + [[4]] * 2 + [[7, STOP]] * 2
    assert found.ended_S.tolist() == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2
    assert found.mask_ST.tolist()[2:5] == [[True, False]] * 3
    assert [[found.answers[row] for row in rows] for rows, _ in sent] == [a for _, a in sent]
    assert sorted(row for rows, _ in sent for row in rows) == list(range(8))
    assert found.num_tokens == 2 * (2 + 9 + 4 + 7) + 12
    assert found.num_squares == 2 * (16 + 100 + 25 + 81)


def test_what_is_scored_is_text_with_a_name():
    asked = Message("user", "5 and 6?")
    said = Conversation((asked,), "Add.", label=Message("assistant", "11"))
    [answer] = sampled(Plan(SAMPLING, name="run"), [Prompt([1, 5, 6], 3, 0, said)], 4)[0].answers
    # the script answers three tokens with none of its own and the end
    assert answer == Answer(
        "run-4-3-0",
        "5 6",
        "",
        "1 5 6 2",
        label="11",
        num_tokens=4,
        conversation=Conversation((asked, Message("assistant", "")), "Add."),
    )
    [bare] = sampled(Plan(SAMPLING), [Prompt([1, 5, 6], 3, 0)], 4)[0].answers
    assert (bare.label, bare.conversation) == ("", None)


def test_a_thought_is_apart_from_what_is_said():
    texts = Texts(Numbers(), reads=lambda text: Message("assistant", text[2:], text[:1]))
    said = Conversation((Message("user", "?"),))
    answer = texts.answer("a", Prompt([5], 0, 0, said), [7, 8, STOP])
    assert answer.conversation.messages[-1] == Message("assistant", "8", "7")


def test_what_the_format_writes_after_a_response_is_scored_with_it():
    """Where the response has ended, by the format's own token, and the prompt is in the format."""
    texts = Texts(Numbers(), ending=(STOP, " end"))
    said = Conversation((Message("user", "?"),))
    spoken, plain = Prompt([5], 0, 0, said), Prompt([5], 0, 0)
    assert texts.answer("a", spoken, [7, STOP]).text == f"5 7 {STOP} end"
    assert texts.answer("a", spoken, [7]).text == "5 7"
    assert texts.answer("a", spoken, []).text == "5"
    assert texts.answer("a", plain, [7, STOP]).text == f"5 7 {STOP}"


def test_seeds_differ_by_run_rollout_row_and_sample_alone():
    def seeds(rows=(0, 1), rollout=0, **keys):
        script = Script()
        sampled(
            Plan(SAMPLING, **keys), [Prompt([5] * 3, row, row) for row in rows], rollout, script
        )
        return script.seeds

    first = seeds()
    assert seeds() == first == seeds(rows=(1, 0))[::-1] == seeds(side_by_side=1)
    others = [*seeds(seed=1), *seeds(rollout=1), *seeds(rows=(2,)), *seeds(num_samples=2)[1::2]]
    assert not set(others) & set(first)
    assert all(0 <= seed < 2**63 for seed in (*first, *others))


@pytest.mark.parametrize("flat", [True, False])
def test_a_batch_of_responses(flat):
    rollout = Rollout(
        [Prompt([5, 6], 0, 0), Prompt([7], 1, 1), Prompt([8, 9, 10], 2, 2)],
        [[3, 4, STOP], [], [11]],
        torch.tensor([True, False, False]),
        [],
    )
    given = {"advantages": torch.arange(9.0).view(3, 3), "reference": torch.ones(3, 3)}
    batch = rollout.batch([2, 0, 1], flat=flat, pad_id=0, given_ST=given)
    assert batch.target_ids.tolist() == [11, 3, 4, STOP]
    assert batch.target_sample.tolist() == [0, 1, 1, 1]
    assert batch.given["advantages"].tolist() == [6.0, 0.0, 1.0, 2.0]
    assert batch.reference.tolist() == [1.0, 3.0, 0.0]
    told = batch.input_ids.flatten()[batch.targets].tolist()
    assert told == [10, 6, 3, 4]  # what each target follows
    moved = batch.map(lambda tensor: tensor + 1)
    assert moved.given["advantages"].tolist() == [7.0, 1.0, 2.0, 3.0]
    empty = rollout.batch([], flat=flat, pad_id=0, given_ST=given)
    assert (empty.num_samples, empty.given["advantages"].shape) == (0, (0,))


@pytest.mark.parametrize("flat", [True, False])
def test_experience_is_what_policy_and_reference_say_of_the_samples(flat):
    engine = policy(flat=flat)
    with torch.no_grad():
        for parameter in engine.frozen.parameters():
            parameter.mul_(0.9)
        engine.model.summary.weight.normal_()
    found = collector(engine, [rewards()], flat=flat, rows=5).collect(prompts(12), 0)
    assert found.scores_S.tolist() == [
        pytest.approx(response.count(7) / 6) for response in found.rollout.responses
    ]
    for row, response in enumerate(found.rollout.responses):
        batch = found.rollout.batch([row], flat=flat, pad_id=0)
        alone, n = engine.logprobs(batch, entropy=True), len(response)
        for known, expected in (
            (found.logprobs_ST, alone.logprobs),
            (found.values_ST, alone.values),
            (found.entropy_ST, alone.entropy),
            (found.reference_ST, engine.reference_logprobs(batch)),
        ):
            torch.testing.assert_close(known[row, :n], expected, atol=1e-5, rtol=1e-5)
            assert not known[row, n:].any()
    assert (found.logprobs_ST - found.reference_ST)[found.mask_ST].abs().min() > 0


def test_a_rank_without_prompts_has_no_experience():
    found = collector(policy(), [rewards()]).collect([], 0)
    assert found.scores_S.shape == (0,)
    assert found.mask_ST.shape == (0, 0)


def test_scores_are_hidden_behind_log_probabilities():
    """Scoring ends only when log-probabilities are asked for, these only when scoring has begun."""
    import threading

    scoring, asking = threading.Event(), threading.Event()

    def meanwhile(asked, responses):
        scoring.set()
        assert asking.wait(300)
        return [0.0] * len(responses)

    class Watched(type(policy())):
        def logprobs(self, batch, *, entropy=False):
            assert scoring.wait(300)
            asking.set()
            return super().logprobs(batch, entropy=entropy)

    engine = policy()
    engine.__class__ = Watched
    collector(engine, [rewards(meanwhile, slots=1)]).collect(prompts(12), 0)
    assert asking.is_set()
