"""The step of ppo on a tiny policy in this process: it learns, is checked, stops and resumes."""

import copy
import functools
import math

import pytest
import torch
from toy_policy import SAMPLING, collector, policy, ppo, prompts, rewards, share_of_wanted

from llmray.errors import RewardError, TrainingError
from llmray.rl import held_out
from llmray.rl.advantages import KlControl, RunningMoments
from llmray.train.decoding import _State
from llmray.train.generate import Sampling

GRPO = {"advantage_estimator": "grpo", "kl_estimator": "k3", "num_samples": 4}
ESTIMATORS = pytest.mark.parametrize("keys", [{}, GRPO], ids=["gae", "grpo"])


def made(keys, sources=None, control=None, asked=None, **options):
    engine = policy(values=not keys)
    asked = asked or (lambda step: prompts(4 if keys else 16))
    return ppo(engine, sources or [rewards()], control, asked, **{**keys, **options})


def run(of, steps, first=0):
    return [
        {name: value.item() for name, value in of(step).metrics.items()}
        for step in range(first, first + steps)
    ]


def weights(of):
    return torch.cat([p.detach().flatten() for p in of.engine.model.parameters()])


@ESTIMATORS
def test_a_verifiable_reward_rises(keys):
    of = made(keys, control=KlControl(0.01))
    found = run(of, 20)
    first, last = (sum(m["score"] for m in part) / 3 for part in (found[:3], found[-3:]))
    assert first < 0.15
    assert last > 3 * first + 0.2
    assert found[-1]["kl"] > found[0]["kl"]
    assert found[-1]["entropy"] < found[0]["entropy"]
    assert of.engine.step == 20


@ESTIMATORS
def test_what_is_logged(keys):
    of = made(keys)
    [told] = run(of, 1)
    expected = {
        *("score", "score_deviation", "kl", "entropy", "response_length", "without_eos"),
        *(
            "unscored",
            "idle_reward",
            "share_rollout",
            "share_logprobs",
            "share_waiting",
            "share_update",
        ),
        *("rollout_tokens_per_second", "update_tokens_per_second", "beta", "num_updates"),
        *("policy_loss", "clip_fraction", "approx_kl", "ratio_error", "sampling_error"),
        *(("kl_loss",) if keys else ("value_loss", "value_clip_fraction", "explained_variance")),
    }
    assert set(told) == expected
    assert told["num_updates"] == 4 * 2  # epochs x mini-batches of 8
    shares = [told[name] for name in told if name.startswith("share_")]
    assert sum(shares) == pytest.approx(1.0)
    assert told["kl"] == pytest.approx(0.0, abs=1e-5)  # the policy still is its reference
    assert 0 < told["response_length"] <= 6
    assert all(math.isfinite(value) for value in told.values())


def test_several_rewards_are_shown_by_themselves():
    sources = [rewards(), rewards(lambda p, r: [2.0] * len(r), -0.5, "constant")]
    [told] = run(made({}, sources), 1)
    assert told["score_constant"] == 2.0
    assert told["score"] == pytest.approx(told["score_share"] - 1.0, abs=1e-6)


@ESTIMATORS
def test_the_first_mini_batch_has_the_ratio_1(keys):
    of = made(keys, epochs=1)
    for told in run(of, 3):
        assert told["ratio_error"] < 1e-5


def test_a_policy_that_reads_differently_from_the_one_that_sampled_is_an_error():
    of = made({}, checks_sampling=False)
    asked = of.engine.logprobs

    def shifted(batch, *, entropy=False):
        found = asked(batch, entropy=entropy)
        found.logprobs.add_(3e-4)
        return found

    of.engine.logprobs = shifted
    with pytest.raises(
        TrainingError, match=r"100\.00% of the tokens .* off 1 by more than 0\.0001"
    ):
        of(0)
    tolerant = made({}, checks_ratio=False, checks_sampling=False)
    tolerant.engine.logprobs = of.engine.logprobs
    tolerant(0)


FILTERED = {**vars(SAMPLING), "top_p": 0.7, "top_k": 10, "temperature": 0.8}


@pytest.mark.parametrize("keys", [vars(SAMPLING), FILTERED], ids=["whole", "filtered"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "mixtral", "qwen3"])
def test_sampling_and_learning_read_the_text_alike(arch, keys):
    """At the draws, with a cache and padding on the left, as for the whole text."""
    long = Sampling(**{**keys, "max_new_tokens": 24})
    engine = policy(values=False, arch=arch)
    engine.model.form = engine.model.form.at(long.temperature)
    [told] = run(ppo(engine, [rewards()], sampling=long, **GRPO), 1)
    assert 0 < told["sampling_error"] < 2e-6


@pytest.mark.parametrize("defect", ["positions", "mask", "cache"])
def test_a_cache_that_reads_differently_is_an_error(defect, monkeypatch):
    """Positions that stand still, a mask that forgets padding, rows with the keys of others."""
    begin, add, keep = _State.start, _State.add, _State.keep

    def start(*args):
        state = begin(*args)
        if defect == "mask":
            state.mask = torch.ones_like(state.mask)
        return state

    def still(self, chosen):
        add(self, chosen)
        if defect == "positions":
            self.positions = torch.zeros_like(self.positions)

    def shuffled(self, index):
        keep(self, index)
        if defect == "cache":
            self.cache.batch_select_indices(torch.arange(len(index)).roll(1))

    monkeypatch.setattr(_State, "start", start)
    monkeypatch.setattr(_State, "add", still)
    monkeypatch.setattr(_State, "keep", shuffled)
    with pytest.raises(TrainingError, match=r"step 1 were drawn .* 0\.0001 at most .*use_kv_cache"):
        made({})(0)
    [told] = run(made({}, checks_sampling=False), 1)
    assert told["sampling_error"] > 1e-4
    assert told["ratio_error"] < 1e-5


@pytest.mark.parametrize("change", [{"repetition_penalty": 1.2}, {"num_beams": 2}])
def test_draws_of_which_no_logprob_is_known_are_not_compared(change):
    sampling = Sampling(**{**vars(SAMPLING), **change})
    [told] = run(ppo(policy(), [rewards()], sampling=sampling), 1)
    assert "sampling_error" not in told


def test_updates_stop_when_the_policy_has_moved_far_enough():
    [free] = run(made({}, epochs=6), 1)
    [stopped] = run(made({}, epochs=6, early_stop_kl=1e-3), 1)
    assert free["num_updates"] == 12
    assert 1 <= stopped["num_updates"] < 12


def test_the_first_mini_batch_is_learned_from_though_dropout_moves_it_far():
    of = made({}, epochs=2, early_stop_kl=1e-6, checks_ratio=False, checks_sampling=False)
    exact = of.engine.logprobs

    def noisy(batch, *, entropy=False):
        found = exact(batch, entropy=entropy)
        found.logprobs.add_(0.3 * torch.randn_like(found.logprobs))
        return found

    of.engine.logprobs = noisy
    [told] = run(of, 1)
    assert told["num_updates"] == 1


def test_the_largest_seed_orders_mini_batches():
    [told] = run(made({}, epochs=2, seed=2**32 - 1), 1)
    assert told["num_updates"] == 4


def test_masked_answers_are_counted_and_not_learned_from():
    """What a masked answer would have got makes no difference; a score does."""

    def trained(how, value):
        def partly(asked, responses):
            marks = [r.startswith(("3", "4", "5")) for r in responses]
            scores = share_of_wanted(asked, responses)
            return [value if mark else s for mark, s in zip(marks, scores, strict=True)]

        seen = []
        of = made({}, [rewards(partly, on_error=how, max_attempts=1)])
        of.show = lambda step, found, kl_S: seen.append(found)
        [told] = run(of, 1)
        return told, seen[0], weights(of)

    told, found, after = trained("mask", math.nan)
    masked = [answer.response.startswith(("3", "4", "5")) for answer in found.rollout.answers]
    assert told["unscored"] == sum(masked) > 0
    assert (~found.valid_S).tolist() == masked
    assert told["score"] == pytest.approx(found.scores_S[found.valid_S].mean().item())
    assert torch.equal(trained("mask", math.inf)[2], after)
    assert not torch.equal(trained("fail", 5.0)[2], after)


def test_without_any_score_the_run_ends():
    of = made({}, [rewards(lambda p, r: [math.nan] * len(r), on_error="mask", max_attempts=1)])
    with pytest.raises(RewardError, match="none of the 16 responses of step 1 has a score"):
        of(0)


def test_answers_that_were_given_a_value_have_no_score():
    """They are learned from, and counted as masked ones are, whichever reward had none."""

    def partly(asked, responses):
        return [math.nan if r.startswith(("3", "4", "5")) else 0.5 for r in responses]

    seen = []
    options = {"on_error": "value", "error_value": -2.0, "max_attempts": 1}
    of = made({}, [rewards(partly, **options), rewards(name="other")])
    of.show = lambda step, found, kl_S: seen.append(found)
    [told] = run(of, 1)
    given = [answer.response.startswith(("3", "4", "5")) for answer in seen[0].rollout.answers]
    assert told["unscored"] == sum(given) > 0
    assert seen[0].valid_S.all()
    share = sum(given) / len(given)
    assert told["score_share"] == pytest.approx(-2.0 * share + 0.5 * (1 - share))


@pytest.mark.parametrize("sources", [1, 2])
def test_values_in_place_of_every_score_end_the_run(sources):
    def broken(asked, responses):
        raise OSError("no route to host")

    asked = [rewards(broken, on_error="value", max_attempts=1), rewards(name="other")][:sources]
    with pytest.raises(RewardError, match=r"none of the 16 responses .* given reward_error_value"):
        made({}, asked)(0)
    engine = policy()
    with pytest.raises(RewardError, match="none of the 4 responses to eval has a score"):
        held_out.judge(collector(engine, asked), {"eval": prompts(4)}, "k1", engine.world)


def test_a_reward_that_fails_ends_the_run_with_its_row():
    def broken(asked, responses):
        raise KeyError("no such rule")

    with pytest.raises(RewardError, match=r"answer ppo-0-\d+-0 .*no such rule"):
        made({}, [rewards(broken)])(0)


@ESTIMATORS
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(keys):
    def fresh():
        control = KlControl(0.05, target=0.5, horizon=50)
        return made(keys, control=control, score_norm=True)

    whole, first, second = fresh(), fresh(), fresh()
    run(whole, 4)
    run(first, 2)
    second.engine.load_state_dict(copy.deepcopy(first.engine.state_dict()))
    second.control.load_state_dict(first.control.state_dict())
    second.moments.load_state_dict(first.moments.state_dict())
    torch.manual_seed(99)
    run(second, 2, first=2)
    assert torch.equal(weights(second), weights(whole))
    assert second.control.beta == whole.control.beta != 0.05
    assert second.moments == whole.moments != RunningMoments()


@pytest.mark.parametrize(
    ("keys", "change"),
    [
        ({}, {"clip_range": 1e-3}),
        ({}, {"value_clip_range": 1e-4}),
        ({}, {"value_coef": 5.0}),
        ({}, {"entropy_coef": 0.5}),
        ({}, {"gamma": 0.5}),
        ({}, {"lam": 0.2}),
        ({}, {"epochs": 2}),
        ({}, {"score_norm": True}),
        ({}, {"whiten_rewards": True}),
        ({}, {"missing_eos_penalty": 1.0}),
        ({}, {"kl_estimator": "k2"}),
        ({}, {"early_stop_kl": 1e-4}),
        ({}, {"seed": 1}),
        ({}, {"num_samples": 2}),
        (GRPO, {"kl_estimator": "k2"}),
        (GRPO, {"clip_range": 1e-3}),
        (GRPO, {"entropy_coef": 0.5}),
        (GRPO, {"num_samples": 2}),
    ],
    ids=str,
)
def test_each_option_matters(keys, change):
    """After two steps, as the first has no divergence yet."""
    after = made(keys, control=KlControl(0.5), **change)
    run(after, 2)
    assert not torch.equal(unchanged("grpo" if keys else "gae"), weights(after))


@functools.cache
def unchanged(estimator):
    before = made(GRPO if estimator == "grpo" else {}, control=KlControl(0.5))
    run(before, 2)
    return weights(before)


@ESTIMATORS
def test_beta_holds_the_policy_near_its_reference(keys):
    loose, tight = made(keys, control=KlControl(0.0)), made(keys, control=KlControl(1.0))
    assert run(tight, 6)[-1]["kl"] < 0.5 * run(loose, 6)[-1]["kl"]


def test_the_weight_of_the_divergence_follows_its_target():
    of = made({}, control=KlControl(0.0001, target=0.2, horizon=40))
    found = run(of, 12)
    assert found[-1]["beta"] > found[0]["beta"]


def test_padded_rows_learn_what_flat_rows_do():
    flat = made({}, epochs=1)
    padded = ppo(policy(flat=False), [rewards()], flat=False, epochs=1)
    run(flat, 2)
    run(padded, 2)
    torch.testing.assert_close(weights(padded), weights(flat), atol=2e-4, rtol=0)


def test_a_rollout_is_shown():
    seen = []
    of = made({})
    of.show = lambda step, found, kl_S: seen.append((step, found.rollout.answers, kl_S))
    of(3)
    [(step, answers, kl_S)] = seen
    assert (step, len(answers), kl_S.shape) == (3, 16, (16,))


@pytest.mark.slow
@ESTIMATORS
def test_a_policy_reaches_nine_tenths_of_the_best_score(keys):
    of = made(keys, control=KlControl(0.001))
    assert max(m["score"] for m in run(of, 80)) > 0.9


@pytest.mark.slow
def test_the_divergence_is_held_near_its_target():
    of = made({}, control=KlControl(0.05, target=2.0, horizon=100))
    found = run(of, 120)
    late = [m["kl"] for m in found[-30:]]
    assert sum(late) / len(late) == pytest.approx(2.0, rel=0.35)


def test_a_longer_budget_is_not_filled_up():
    sampling = Sampling(**{**vars(SAMPLING), "max_new_tokens": 3})
    of = ppo(policy(), [rewards()], sampling=sampling)
    [told] = run(of, 1)
    assert told["response_length"] <= 3
