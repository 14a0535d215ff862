"""Rewards from functions, and weighted sums of several sources through their pools."""

import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from llmray.errors import ArgumentsError, RewardError
from llmray.rl.handles import Answer, Desk, InProcess
from llmray.rl.pool import Pool, PoolOptions
from llmray.rl.reward_api import ApiOptions
from llmray.rl.reward_function import FunctionReward
from llmray.rl.rewards import Source, WeightedRewards, handle_of, kind_of, names_of

ANSWERS = [Answer(f"r-{i}", f"p{i}", "x" * i, "", label="xx") for i in range(5)]


@pytest.fixture
def module(tmp_path):
    """A folder with a module of reward functions."""
    (tmp_path / "own_rewards.py").write_text(
        "def length(prompts, responses):\n"
        "    return [len(response) for response in responses]\n"
        "def right(prompts, responses, labels):\n"
        "    return [r == label for r, label in zip(responses, labels)]\n"
        "class Rules:\n"
        "    @staticmethod\n"
        "    def zero(prompts, responses, labels=()):\n"
        "        return [0.0 for _ in responses]\n"
        "def scaled(prompts, responses, weight=1.0):\n"
        "    return [weight * len(response) for response in responses]\n"
        "def any_number(*texts):\n"
        "    return [float(len(texts)) for _ in texts[0]]\n"
        "def three(a, b, c, d):\n"
        "    return []\n"
        "value = 3\n"
    )
    yield tmp_path
    sys.path.remove(str(tmp_path))
    sys.modules.pop("own_rewards", None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own_rewards:length", [0.0, 1.0, 2.0, 3.0, 4.0]),
        ("own_rewards:right", [0.0, 0.0, 1.0, 0.0, 0.0]),
        ("own_rewards:Rules.zero", [0.0] * 5),
        ("own_rewards:scaled", [0.0, 1.0, 2.0, 3.0, 4.0]),
        ("own_rewards:any_number", [3.0] * 5),
    ],
)
def test_a_function_by_its_import_path(module, name, expected):
    assert FunctionReward.named(name, module).score(ANSWERS) == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:f", "No module named 'no_such_module'.*of a file in"),
        ("own_rewards:missing", "has no attribute 'missing'"),
        ("own_rewards:value", "is a int"),
        ("own_rewards:three", r"takes \(a, b, c, d\)"),
    ],
)
def test_what_is_no_reward_function(module, name, told):
    sys.path.append(str(module))
    with pytest.raises(ArgumentsError, match=told):
        FunctionReward.named(name, module)


@pytest.mark.parametrize("made", [np.array, torch.tensor, tuple, iter])
def test_numbers_in_any_form(made):
    of = FunctionReward("f", lambda prompts, responses: made([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert of.score(ANSWERS) == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("given", "told"),
    [([1.0], "1 numbers for 5"), (None, "gave None"), (["a"] * 5, "gave"), (2.0, "gave 2.0")],
)
def test_what_is_no_list_of_numbers(given, told):
    with pytest.raises(RewardError, match=told):
        FunctionReward("f", lambda prompts, responses: given).score(ANSWERS)


def raising(prompts, responses):
    return [1 / (len(response) - 3) for response in responses]


def test_a_function_that_raises_fails_the_run_and_names_the_answer():
    of = Pool([InProcess("f", FunctionReward("own:f", raising))], PoolOptions())
    with pytest.raises(RewardError, match=r"answer r-3 .*own:f raised ZeroDivisionError") as error:
        of.submit(ANSWERS).result(300)
    assert "'p3'" in str(error.value)
    assert "'xxx'" in str(error.value)
    of.close()


def source(name, weight, function, **options):
    handle = InProcess(name, FunctionReward(name, function))
    return Source(name, weight, Pool([handle], PoolOptions(**options)))


def test_a_weighted_sum_and_its_parts():
    """0.5 * length - 2 * (length is even): 0: -2, 1: 0.5, 2: -1, 3: 1.5, 4: 0."""
    rewards = WeightedRewards(
        [
            source("length", 0.5, lambda p, r: [len(x) for x in r]),
            source("even", -2.0, lambda p, r: [len(x) % 2 == 0 for x in r]),
        ]
    )
    found = rewards.submit(ANSWERS).result(300)
    assert found.scores == [-2.0, 0.5, -1.0, 1.5, 0.0]
    assert found.parts == {"length": [0.0, 1.0, 2.0, 3.0, 4.0], "even": [1.0, 0.0, 1.0, 0.0, 1.0]}
    assert rewards.counts().scored == 10
    rewards.close()


def test_an_answer_that_one_source_masks_is_masked():
    rewards = WeightedRewards(
        [
            source("one", 1.0, raising, on_error="mask", max_attempts=1),
            source("two", 1.0, lambda p, r: [0.0] * len(r)),
        ]
    )
    found = rewards.submit(ANSWERS).result(300)
    assert [math.isnan(score) for score in found.scores] == [False, False, False, True, False]
    assert not any(map(math.isnan, found.parts["two"]))
    assert rewards.counts().failed == 1
    rewards.close()


def test_answers_that_one_source_gave_the_value_are_known():
    rewards = WeightedRewards(
        [
            source("one", 1.0, raising, on_error="value", error_value=-1.0, max_attempts=1),
            source("two", 2.0, lambda p, r: [1.0] * len(r)),
        ]
    )
    found = rewards.submit(ANSWERS).result(300)
    assert found.scores[3] == -1.0 + 2.0
    assert found.given == {3}
    rewards.close()


def test_a_source_that_fails_is_the_sums_failure():
    rewards = WeightedRewards(
        [source("one", 1.0, raising), source("two", 1.0, lambda p, r: [0.0] * len(r))]
    )
    with pytest.raises(RewardError, match="one raised"):
        rewards.submit(ANSWERS).result(300)
    rewards.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("http://localhost:8000/v1/score/evaluation", "api"),
        ("https://host/x", "api"),
        ("my_rewards:score", "function"),
        ("package.module:Class.method", "function"),
        ("org/model", "model"),
        ("/folder/model", "model"),
        ("s3://bucket/model", "model"),
        (r"C:\models\rm", "model"),
        ("saves/rm-1.5", "model"),
    ],
)
def test_what_a_name_stands_for(name, kind):
    assert kind_of(name) == kind


def test_handles_of_servers_and_functions(module):
    of = handle_of("own_rewards:length", folder=module, api=ApiOptions())
    assert of.call("score", ANSWERS).result(300) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert of.name == "own_rewards:length"
    with pytest.raises(ArgumentsError, match="password"):
        handle_of("http://a:b@host/", folder=module, api=ApiOptions())


def test_names_in_metrics():
    models = ["org/rm", "/other/rm/", "own:score", "http://host/v1/score/evaluation", "rm"]
    assert names_of(models) == ["rm", "rm_2", "score", "evaluation", "rm_3"]


HANGING = """
import time
from llmray.rl.handles import InProcess
class Slow:
    def score(self, answers):
        time.sleep(10_000)
InProcess("slow", Slow()).call("score", [])
time.sleep(0.1)
print("ends")
"""


def test_a_reward_that_hangs_does_not_keep_the_process_from_ending():
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "ends\n"


def test_a_closed_handle_starts_no_more_and_one_that_is_dropped_ends_its_threads():
    entered, goes_on = threading.Event(), threading.Event()

    class Waits:
        def score(self, answers):
            entered.set()
            assert goes_on.wait(60)
            return [1.0]

    handle = InProcess("waits-for-close", Waits())
    first, second = handle.call("score", []), handle.call("score", [])
    assert entered.wait(60)
    handle.close()
    goes_on.set()
    assert first.result(60) == [1.0]
    assert second.cancelled()
    InProcess("dropped", Waits(), 3)
    deadline = time.monotonic() + 60
    names = {"handle-dropped", "handle-waits-for-close"}
    while any(thread.name in names for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_calls_on_a_desk_are_made_by_the_thread_that_waits():
    desk = Desk()
    threads = []

    class Model:
        def score(self, answers):
            threads.append(threading.current_thread())
            time.sleep(0.05)
            if any(answer.response == "xxxx" for answer in answers):
                raise ValueError("four are too many")
            return [float(len(answer.response)) for answer in answers]

    # nothing hangs that is merely not waited for yet
    options = PoolOptions(request_timeout_s=math.inf, batch_tokens=1)
    handle = InProcess("model", Model(), desk=desk)
    slow = InProcess("slow", Model(), desk=desk)
    sources = [Source("a", 1.0, Pool([handle], options)), Source("b", 2.0, Pool([slow], options))]
    added = WeightedRewards(sources, desk)
    asked = [added.submit(ANSWERS[:3]), added.submit(ANSWERS[3:4])]
    time.sleep(0.3)
    assert not threads
    assert added.wait(asked[1]).scores == [9.0]
    assert added.wait(asked[0]).parts == {"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}
    assert set(threads) == {threading.current_thread()}
    # busy is the time in calls, without that until they were waited for
    busy = added.counts().busy_s
    assert busy >= 8 * 0.05
    assert busy == pytest.approx(handle.busy_s + slow.busy_s)
    with pytest.raises(RewardError, match="four are too many"):
        added.wait(added.submit(ANSWERS[4:]))
    added.close()
