"""The engine on a tiny model: independence of the split, state, clipping, fp16 scaling."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tiny import build_model

from llmray.arguments.optimizer import OptimizerArguments
from llmray.batch import Batch, Segments
from llmray.errors import CheckpointError
from llmray.model.head import TokenModel
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import LanguageModeling
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS

CPU = World.single(torch.device("cpu"))


def engine(*, precision="fp32", dropout=0.0, clip=1.0, trains=None, **keys):
    torch.manual_seed(0)
    model = build_model("llama", amplify=2.0, attention_dropout=dropout)
    token_model = TokenModel(model, flat=True)
    if PRECISIONS[precision].pure:
        token_model.to(torch.bfloat16)
    for name, parameter in token_model.named_parameters():
        parameter.requires_grad_(trains is None or trains in name)
    trainable = {n: p for n, p in token_model.named_parameters() if p.requires_grad}
    options = OptimizerArguments(learning_rate=0.01, **keys)
    return Engine(
        token_model,
        trainable,
        optimizers.build(token_model, trainable, options),
        schedules.schedule(options, 10),
        world=CPU,
        precision=PRECISIONS[precision],
        max_grad_norm=clip,
    )


def rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator) for length in lengths]


def flat(sequences):
    """A flat batch in which all tokens but each first one are targets."""
    lengths = tuple(len(sequence) for sequence in sequences)
    starts = torch.tensor((0, *lengths)).cumsum(0)[:-1].tolist()
    targets = [torch.arange(s, s + n - 1) for s, n in zip(starts, lengths, strict=True)]
    samples = [torch.full((n - 1,), i) for i, n in enumerate(lengths)]
    return Batch(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        targets=torch.cat(targets),
        target_ids=torch.cat([sequence[1:] for sequence in sequences]),
        target_sample=torch.cat(samples),
        num_samples=len(lengths),
        num_tokens=sum(lengths),
        segments=Segments(lengths, lengths),
    )


def weights(of):
    return torch.cat([p.detach().flatten() for p in of._trainable.values()])


def train(of, steps, seed=1):
    losses = []
    for step in range(steps):
        batch = flat(rows(9, 14, seed=seed + step))
        losses.append(of.forward_backward([batch], LanguageModeling()).loss.item())
        of.optim_step()
    return losses


def test_loss_is_the_mean_over_target_tokens():
    sequences = rows(6, 11, 17)
    of = engine()
    model = of.model.model
    done = of.forward_backward([flat(sequences)], LanguageModeling())
    total = 0.0
    with torch.no_grad():
        for sequence in sequences:
            batch = flat([sequence])
            total -= of.logprobs(batch).logprobs.sum().item()
    assert done.count == 5 + 10 + 16
    assert done.loss.item() == pytest.approx(total / 31, rel=1e-6)
    assert model.training is False  # logprobs runs without dropout


@pytest.mark.parametrize("split", [[3], [1, 1, 1], [2, 1], [1, 2]])
def test_result_does_not_depend_on_the_split_into_micro_batches(split):
    sequences = rows(6, 11, 17)
    whole, parts = engine(), engine()
    first = whole.forward_backward([flat(sequences)], LanguageModeling())
    cuts = torch.tensor((0, *split)).cumsum(0).tolist()
    micro = [flat(sequences[a:b]) for a, b in itertools.pairwise(cuts)]
    second = parts.forward_backward(micro, LanguageModeling())
    assert second.loss.item() == pytest.approx(first.loss.item(), abs=1e-6)
    assert second.num_tokens == first.num_tokens == 34
    one, two = whole.optim_step(), parts.optim_step()
    assert two.grad_norm.item() == pytest.approx(one.grad_norm.item(), rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), atol=2e-5, rtol=0)


OPTIMIZERS = {
    "adamw_torch": {"weight_decay": 0.1},
    "adamw_torch_fused": {},
    "adafactor": {"optim_args": "beta1=0.9,scale_parameter=true"},
    "sgd": {"optim_args": "momentum=0.9,nesterov=true"},
    "adagrad": {},
    "rmsprop": {"optim_args": "momentum=0.5,centered=true"},
}


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumed_engine_is_bitwise_equal(optim, pure):
    """Also where weights are bf16 and Adafactor's moments are not."""
    keys = {**OPTIMIZERS[optim], "optim": optim, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    keys |= {"precision": "pure_bf16" if pure else "fp32"}
    whole = engine(**keys)
    train(whole, 5)
    first = engine(**keys)
    train(first, 3)
    state = copy.deepcopy(first.state_dict())
    second = engine(**keys)
    second.load_state_dict(state)
    train(second, 2, seed=4)
    assert second.step == whole.step == 5
    assert torch.equal(weights(second), weights(whole))
    assert not torch.equal(weights(second), weights(engine(**keys)))


def test_resumed_plateau_is_bitwise_equal():
    keys = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 1},
    }
    whole, first, second = engine(**keys), engine(**keys), engine(**keys)
    for of in (whole, first):
        for metric in (1.0, 2.0):
            of.schedule.observe(metric, greater_is_better=False)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for of in (whole, second):
        of.schedule.observe(3.0, greater_is_better=False)
        of.forward_backward([flat(rows(5))], LanguageModeling())
    assert second.optim_step().learning_rate == whole.optim_step().learning_rate == 0.005


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    """SGD-like check through Adam is blind to scale, so the gradient itself is looked at."""
    of = engine(clip=0.1)
    of.forward_backward([flat(rows(20))], LanguageModeling())
    seen = []

    def look(*_):
        grads = [p.grad.flatten() for p in of._trainable.values() if p.grad is not None]
        seen.append(torch.cat(grads).norm().item())

    of._optimizer.register_step_pre_hook(look)
    norm = of.optim_step().grad_norm.item()
    assert norm > 0.1
    assert seen == pytest.approx([0.1], rel=1e-4)


def test_learning_rate_follows_the_schedule():
    of = engine(lr_scheduler_type="linear")
    rates = []
    for _ in range(3):
        of.forward_backward([flat(rows(5))], LanguageModeling())
        rates.append(of.optim_step().learning_rate)
    assert rates == pytest.approx([0.01, 0.009, 0.008])


def test_frozen_parameters_stay():
    of = engine(trains="mlp")
    before = {n: p.detach().clone() for n, p in of.model.named_parameters()}
    train(of, 2)
    changed = {n for n, p in of.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "mlp" in n}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_comes_near_to_float32(precision):
    exact, mixed = engine(), engine(precision=precision)
    assert train(mixed, 2) == pytest.approx(train(exact, 2), rel=0.02)
    assert all(p.dtype == torch.float32 for p in mixed._trainable.values())


def test_a_step_without_any_target_is_refused():
    batch = flat(rows(1))
    with pytest.raises(ValueError, match="no rank has a target"):
        engine().forward_backward([batch], LanguageModeling())


def test_a_micro_batch_without_targets_changes_nothing():
    empty = flat([torch.tensor([5])])
    with_it, without = engine(), engine()
    sequences = flat(rows(7, 9))
    with_it.forward_backward([sequences, empty], LanguageModeling())
    without.forward_backward([sequences], LanguageModeling())
    with_it.optim_step()
    without.optim_step()
    torch.testing.assert_close(weights(with_it), weights(without), atol=1e-7, rtol=0)


def test_state_of_another_model_is_refused_by_name():
    state = engine(trains="mlp").state_dict()
    with pytest.raises(CheckpointError, match=r"trainable parameters differ.*overwrite_output_dir"):
        engine(trains="self_attn").load_state_dict(state)
