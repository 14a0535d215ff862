"""What stage ppo asks of the engine beside the usual: entropies, several updates in one step."""

import torch
from layouts import make_rows
from tiny import build_model

from llmray.arguments.optimizer import OptimizerArguments
from llmray.model.head import TokenModel
from llmray.train import optimizers, schedules
from llmray.train.engine import Engine
from llmray.train.losses import LanguageModeling, LossOutput
from llmray.train.parallel import World
from llmray.train.precision import PRECISIONS


def engine(total_steps=4):
    model = TokenModel(build_model(amplify=2.0), flat=True)
    trainable = dict(model.named_parameters())
    options = OptimizerArguments(learning_rate=0.01, lr_scheduler_type="linear")
    return Engine(
        model,
        trainable,
        optimizers.build(model, trainable, options),
        schedules.schedule(options, total_steps),
        world=World.single(torch.device("cpu")),
        precision=PRECISIONS["fp32"],
        max_grad_norm=1.0,
    )


class Entropy(LanguageModeling):
    """The negative entropy, to be raised."""

    def __call__(self, output, batch):
        return LossOutput(-output.entropy.sum())


def test_an_objective_may_read_entropies():
    of, rows = engine(), make_rows().flat
    before = of.logprobs(rows, entropy=True).entropy.mean()
    assert of.logprobs(rows).entropy is None
    for _ in range(3):
        of.forward_backward([rows], Entropy(), entropy=True)
        of.optim_step()
    assert of.logprobs(rows, entropy=True).entropy.mean() > before


def test_several_updates_in_one_step_of_the_schedule():
    """Linear from 0.01 over 4 steps: 0.01, 0.01, 0.01 in the first, 0.0075 in the second."""
    of, rows, rates = engine(), make_rows().flat, []
    for _ in range(2):
        for _ in range(3):
            of.forward_backward([rows], LanguageModeling())
            rates.append(of.optim_step(advances=False).learning_rate)
        of.advance()
    assert rates == [0.01] * 3 + [0.0075] * 3
    assert of.step == 2


def test_dropped_gradients_leave_no_trace():
    of, other, rows = engine(), engine(), make_rows().flat
    of.forward_backward([rows], Entropy(), entropy=True)
    of.drop_gradients()
    for each in (of, other):
        each.forward_backward([rows], LanguageModeling())
        each.optim_step()
    ours, theirs = (dict(each.model.named_parameters()) for each in (of, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
