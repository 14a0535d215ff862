"""The best evaluation and early stopping, beside transformers' own callback."""

import math
from types import SimpleNamespace

import pytest

from llmray.train.stopping import Best, EarlyStopping, Judge

LOSSES = [3.0, 2.0, 1.95, 1.93, 1.92, 2.5, 1.0, 1.2, 1.3, 1.4, 0.9, 0.89, 0.88, 0.87]


def judge(patience=2, threshold=0.0, *, greater=False):
    best = Best("eval_loss", greater_is_better=greater)
    return Judge(best, EarlyStopping(best, patience, threshold))


def stop_of_transformers(values, patience, threshold, greater):
    """The number of evaluations after which transformers' callback stops; None: it does not.

    Its Trainer notes the best metric after the callback has seen the evaluation.
    """
    from transformers import EarlyStoppingCallback

    callback = EarlyStoppingCallback(patience, threshold)
    arguments = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
    state, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
    for number, value in enumerate(values, 1):
        callback.on_evaluate(arguments, state, control, {"eval_loss": value})
        better = state.best_metric is None or (
            value > state.best_metric if greater else value < state.best_metric
        )
        state.best_metric = value if better else state.best_metric
        if control.should_training_stop:
            return number
    return None


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("patience", [1, 2, 3, 4])
def test_stops_where_transformers_does(patience, threshold, greater):
    values = [-loss for loss in LOSSES] if greater else LOSSES
    of = judge(patience, threshold, greater=greater)
    stopped = None
    for number, value in enumerate(values, 1):
        of.see(number, {"eval_loss": value})
        if of.reason():
            stopped = number
            break
    assert stopped == stop_of_transformers(values, patience, threshold, greater)


def test_state_goes_on_where_it_was():
    whole, first, second = judge(3), judge(3), judge(3)
    for step, loss in enumerate([2.0, 1.0, 1.5, 1.6], 1):
        for of in (whole, first):
            of.see(step, {"eval_loss": loss})
            of.saved(step, {"eval_loss": loss})
    second.load_state_dict(first.state_dict())
    for of in (whole, second):
        of.see(5, {"eval_loss": 1.2})
    assert second.reason() == whole.reason() is not None
    assert second.state_dict() == whole.state_dict()
    assert second.saved_step == 2


def test_the_best_that_was_saved_is_another_than_the_best():
    of = judge(9)
    for step, loss in enumerate([5.0, 1.0, 2.0, 3.0], 1):
        of.see(step, {"eval_loss": loss})
        if step != 2:
            of.saved(step, {"eval_loss": loss})
    assert (of.best.step, of.best.saved_step) == (2, 3)
    assert of.best.saved_metrics == {"eval_loss": 2.0}


def test_not_a_number_is_never_better():
    of = judge(2)
    assert not of.see(1, {"eval_loss": math.nan})
    assert of.see(2, {"eval_loss": 5.0})
    assert not of.see(3, {"eval_loss": math.nan})
    assert of.best.value == 5.0


def test_another_metric_begins_anew():
    of = judge()
    of.see(1, {"eval_loss": 1.0})
    other = Best("eval_accuracy", greater_is_better=True)
    other.load_state_dict(of.best.state_dict())
    assert other.value is None


def test_without_questions_nothing_is_judged():
    of = Judge()
    assert of.see(1, {}) is False
    of.saved(1, {})
    assert of.reason() is None
    assert of.saved_step is None
    of.load_state_dict(judge().state_dict())
