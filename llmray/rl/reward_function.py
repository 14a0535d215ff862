"""Rewards from a Python function, for what can be verified: `reward_model: my_rewards:score`.

`score(prompts, responses)` or `score(prompts, responses, labels)` takes lists of text and gives a
list with a number for each; labels are the data set's responses.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmray.errors import ArgumentsError, RewardError
from llmray.rl.handles import Answer


class FunctionReward:
    """Scores by a function of lists of texts.

    Args:
        name: `module:function`, for messages.
        function: takes prompts and responses, and labels (the data set's responses) where it has a
            third parameter; gives a number for each.

    Raises:
        ArgumentsError: it takes neither two nor three arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function
        self._takes_labels = _num_arguments(name, function) == 3

    @classmethod
    def named(cls, name: str, folder: Path) -> FunctionReward:
        """The function that `name` is the import path of.

        Args:
            name: `module:function`; the module may be in a package.
            folder: where modules are looked for beside the installed ones.

        Raises:
            ArgumentsError: there is no such module or function.
        """
        module_name, _, attribute = name.partition(":")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        try:
            found: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ArgumentsError(
                f"reward_model={name}: {error}. A function `module:function` of an installed "
                f"module or of a file in {folder} is required."
            ) from error
        if not callable(found):
            raise ArgumentsError(
                f"reward_model={name} is a {type(found).__name__}. A function of prompts and "
                "responses is required."
            )
        return cls(name, found)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards of `answers`, in order; a reward may still be NaN.

        Raises:
            RewardError: the function raised, or gave something else than a number an answer.
        """
        texts = [[a.prompt for a in answers], [a.response for a in answers]]
        if self._takes_labels:
            texts.append([answer.label for answer in answers])
        try:
            given = self._function(*texts)
        except Exception as error:  # a boundary: the user's own code
            raise RewardError(
                f"reward_model={self._name} raised {type(error).__name__}: {error}. A number for "
                "each response is required. Mend the function."
            ) from error
        # arrays of numpy and tensors of torch have it
        scores = given.tolist() if hasattr(given, "tolist") else given
        try:
            numbers = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward_model={self._name} gave {given!r:.100}. A list with a number for each "
                "response is required. Mend the function."
            ) from error
        if len(numbers) != len(answers):
            raise RewardError(
                f"reward_model={self._name} gave {len(numbers)} numbers for {len(answers)} "
                "responses. One for each is required. Mend the function."
            )
        return numbers


def _num_arguments(name: str, function: Callable[..., Any]) -> int:
    """Whether a function is called with two lists or with three."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in
        return 2
    for number in (3, 2):
        try:
            bound = signature.bind(*[[]] * number)
        except TypeError:
            continue
        *_, last = (signature.parameters[name] for name in bound.arguments)
        # one that may be left out and is called otherwise is the function's own matter
        if number == 3 and last.default is not last.empty and last.name != "labels":
            continue
        return number
    raise ArgumentsError(
        f"reward_model={name} takes {signature}. A function of (prompts, responses) or (prompts, "
        "responses, labels) is required."
    )
