"""Settings of schedules and optimizers: mistakes are said before anything is loaded."""

import subprocess
import sys

import pytest

from llmray.arguments.loading import load
from llmray.arguments.settings import optimizer_settings, schedule_settings
from llmray.errors import ArgumentsError

BASE = {"model_name_or_path": "m", "dataset": "a", "output_dir": "o", "do_train": True}


def said(**keys):
    with pytest.raises(ArgumentsError) as error:
        load(BASE | keys, environ={})
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cosine", {"num_cycle": 1}, ["num_cycle is no setting", "Did you mean num_cycles?"]),
        ("cosine_with_min_lr", {"x": 1}, ["it takes num_cycles, min_lr, min_lr_rate"]),
        ("linear", {"power": 2}, ["lr_scheduler_type=linear", "it takes no settings"]),
        ("polynomial", {"power": 0}, ["power=0 is wrong", "a number, above 0"]),
        ("polynomial", {"power": "two"}, ["power=two is wrong"]),
        ("cosine_with_restarts", {"num_cycles": 1.5}, ["a whole number, at least 1"]),
        ("warmup_stable_decay", {"decay_type": "sqrt"}, ["one of linear, cosine, 1-sqrt"]),
        ("step", {"gamma": 0.5}, ["lacks step_size", "a whole number, at least 1"]),
        ("step", {}, ["lacks step_size"]),
        ("cosine_with_min_lr", {}, ["requires one of min_lr and min_lr_rate", "neither is given"]),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, ["both are given"]),
        ("cosine_with_min_lr", {"min_lr": 1.0}, ["min_lr=1.0", "learning_rate=5e-05", "below"]),
        ("polynomial", {"lr_end": 5e-5}, ["lr_end=5e-05", "learning_rate=5e-05"]),
    ],
)
def test_wrong_settings_of_a_schedule(name, settings, words):
    text = said(lr_scheduler_type=name, lr_scheduler_kwargs=settings)
    assert all(word in text for word in words), text


def test_the_default_end_of_a_polynomial_is_below_the_rate():
    assert "lr_end=1e-07" in said(lr_scheduler_type="polynomial", learning_rate=1e-8)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sgd", "momentun=0.9", ["momentun is no setting of optim=sgd", "Did you mean momentum?"]),
        ("adamw_torch", "betas=0.9", ["optim=adamw_torch; it takes no settings"]),
        ("sgd", "momentum", ["name=value,name=value"]),
        ("sgd", "nesterov=true", ["nesterov requires a momentum above 0"]),
        ("rmsprop", "alpha=2", ["alpha=2 is wrong", "at least 0 and at most 1"]),
    ],
)
def test_wrong_settings_of_an_optimizer(name, text, words):
    message = said(optim=name, optim_args=text)
    assert all(word in message for word in words), message


def test_settings_are_read_with_their_types():
    keys = {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"}
    keys |= {"lr_scheduler_type": "step", "lr_scheduler_kwargs": '{"step_size": "3"}'}
    arguments = load(BASE | keys, environ={}).optimizer
    sgd = optimizer_settings(arguments).model_dump()
    assert sgd == {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
    assert schedule_settings(arguments).model_dump() == {"step_size": 3, "gamma": 0.1}


def test_the_plateau_needs_evaluations():
    assert "decides by evaluations" in said(lr_scheduler_type="reduce_lr_on_plateau")


@pytest.mark.parametrize("name", ["constant", "reduce_lr_on_plateau"])
def test_a_warmup_that_does_nothing_is_said(name, caplog):
    keys = {"val_size": 0.1, "eval_strategy": "epoch", "warmup_ratio": 0.1}
    load(BASE | keys | {"lr_scheduler_type": name}, environ={})
    assert f"warmup_ratio=0.1 does nothing with lr_scheduler_type={name}" in caplog.text


def test_settings_are_checked_without_torch():
    code = (
        "import sys\nfrom llmray.arguments.loading import load\n"
        "try:\n    load({'lr_scheduler_type': 'step'}, environ={})\n"
        "except Exception as error:\n    print('step_size' in str(error), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"
