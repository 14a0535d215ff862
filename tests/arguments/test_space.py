"""Search spaces: what is drawn, what a grid holds, when a key counts, and what is refused."""

import random
from collections import Counter

import pytest

from llmray.arguments.space import VARIANT, Distribution, parse


def space(search=None, variants=()):
    found, problems = parse(search or {}, variants)
    assert not problems, [problem.text for problem in problems]
    return found


def problems(search=None, variants=()):
    return [problem.text for problem in parse(search or {}, variants)[1]]


def drawn(kind, values, count=2000):
    distribution = space({"key": {kind: values}}).dimensions[0].distribution
    generator = random.Random(0)
    return [distribution.draw(generator) for _ in range(count)]


def test_uniform_numbers_lie_evenly_between_both_ends():
    found = drawn("uniform", [1, 3])
    assert min(found) >= 1
    assert max(found) <= 3
    assert abs(sum(found) / len(found) - 2) < 0.05


def test_loguniform_numbers_are_as_often_in_each_power_of_ten():
    powers = Counter(f"{value:.0e}"[-3:] for value in drawn("loguniform", [1e-5, 1e-3]))
    assert all(abs(powers[power] / 2000 - 0.5) < 0.05 for power in ("-05", "-04"))


def test_randint_draws_both_ends():
    assert Counter(drawn("randint", [1, 3])).keys() == {1, 2, 3}
    assert all(isinstance(value, int) for value in drawn("randint", [1, 3], 20))


def test_quniform_draws_whole_steps_from_low_to_high():
    assert sorted(set(drawn("quniform", [0.1, 0.5, 0.2]))) == [0.1, 0.3, 0.5]
    assert sorted(set(drawn("quniform", [4, 12, 4]))) == [4, 8, 12]


def test_numbers_are_drawn_with_as_many_digits_as_files_show():
    assert all(value == float(f"{value:.6g}") for value in drawn("loguniform", [1e-5, 1e-3], 50))


def test_a_grid_has_every_combination_in_order():
    found = space({"a": {"grid": [1, 2]}, "b": {"choice": ["x", "y"]}})
    assert list(found.grid()) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_a_grid_counts_whole_numbers_and_steps_and_leaves_out_what_cannot_be_counted():
    found = space({"a": {"randint": [1, 2]}, "b": {"quniform": [0, 1, 0.5]}})
    assert [tuple(point.values()) for point in found.grid()] == [
        (a, b) for a in (1, 2) for b in (0, 0.5, 1)
    ]
    assert list(space({"a": {"uniform": [0, 1]}}).grid()) == [{}]


CONDITIONAL = {
    "lora_rank": {"choice": [4, 8], "when": {"finetuning_type": "lora"}},
    "finetuning_type": {"choice": ["lora", "full", "freeze"]},
}


def test_a_key_counts_beside_certain_values_alone():
    assert list(space(CONDITIONAL).grid()) == [
        {"finetuning_type": "lora", "lora_rank": 4},
        {"finetuning_type": "lora", "lora_rank": 8},
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze"},
    ]


def test_a_condition_may_name_several_values_and_keys_of_variants():
    found = space(
        {"b": {"grid": [1, 2], "when": {"a": [1, 2]}}}, [{"a": 1}, {"a": 2, "c": 0}, {"a": 3}]
    )
    assert list(found.grid()) == [
        {VARIANT: 0, "b": 1},
        {VARIANT: 0, "b": 2},
        {VARIANT: 1, "b": 1},
        {VARIANT: 1, "b": 2},
        {VARIANT: 2},
    ]
    assert found.keys == ("a", "c", "b")


def test_conditions_may_follow_one_another():
    found = space(
        {
            "c": {"grid": [5, 6], "when": {"b": 2}},
            "b": {"grid": [1, 2], "when": {"a": True}},
            "a": {"grid": [False, True]},
        }
    )
    assert list(found.grid()) == [
        {"a": False},
        {"a": True, "b": 1},
        {"a": True, "b": 2, "c": 5},
        {"a": True, "b": 2, "c": 6},
    ]
    assert ("c", {"a": True, "b": 2, "c": 6}) in list(found.probes())


def test_assembling_asks_for_active_keys_alone_in_their_order():
    asked = []

    def last(key: str, distribution: Distribution) -> object:
        asked.append(key)
        return distribution.ends()[-1]

    assert space(CONDITIONAL).assemble(last) == {"finetuning_type": "freeze"}
    assert asked == ["finetuning_type"]


def test_probes_have_every_end_and_every_variant():
    found = space({"a": {"uniform": [0.1, 0.2]}, "b": {"choice": [1, 2, 3]}}, [{"c": 1}, {"c": 2}])
    values = [values for _, values in found.probes()]
    assert {value["a"] for value in values} == {0.1, 0.2}
    assert {value["b"] for value in values} == {1, 2, 3}
    assert {value["c"] for value in values} == {1, 2}


def test_a_condition_may_lie_within_a_range():
    found = space({"a": {"randint": [1, 9]}, "b": {"choice": [1], "when": {"a": 4}}})
    assert ("b", {"a": 4, "b": 1}) in list(found.probes())


WRONG = [
    ({"a": {"loguniforn": [1, 2]}}, "Did you mean loguniform?"),
    ({"a": {}}, "nothing is no distribution"),
    ({"a": {"uniform": [1, 2], "choice": [1]}}, "uniform, choice is no distribution"),
    ({"a": [1, 2]}, "Write {choice: [1, 2]}"),
    ({"a": 3}, "says no distribution"),
    ({"a": {"choice": []}}, "a list of values is required"),
    ({"a": {"choice": 4}}, "a list of values is required"),
    ({"a": {"grid": [4, 8, 4]}}, "has 4 twice"),
    ({"a": {"uniform": [2, 1]}}, "low must be below high"),
    ({"a": {"uniform": [1, 1]}}, "low must be below high"),
    ({"a": {"uniform": [1]}}, "2 numbers are required"),
    ({"a": {"uniform": [1, 2, 3]}}, "2 numbers are required"),
    ({"a": {"uniform": ["1", "2"]}}, "2 numbers are required"),
    ({"a": {"uniform": [False, True]}}, "2 numbers are required"),
    ({"a": {"uniform": [1, float("inf")]}}, "2 numbers are required"),
    ({"a": {"loguniform": [0, 1]}}, "low must be above 0"),
    ({"a": {"randint": [1.5, 3]}}, "both must be whole numbers"),
    ({"a": {"quniform": [0, 1]}}, "3 numbers are required"),
    ({"a": {"quniform": [0, 1, 0.3]}}, "lead from low to high in whole steps"),
    ({"a": {"quniform": [0, 1, -0.5]}}, "step must be above 0"),
    ({"a": {"choice": [1], "when": 3}}, "when=3 is no condition"),
    ({"a": {"choice": [1], "when": {}}}, "is no condition"),
    ({"alpha": {"choice": [1]}, "b": {"choice": [1], "when": {"alpa": 1}}}, "Did you mean alpha?"),
    ({"a": {"choice": [1]}, "b": {"choice": [1], "when": {"a": 2}}}, "which no trial can be"),
    (
        {"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}},
        "name one another in a circle",
    ),
]


@pytest.mark.parametrize(("search", "said"), WRONG)
def test_what_is_no_space_is_refused(search, said):
    [text] = problems(search)
    assert said in text
    assert text.startswith("tune: ")


def test_what_is_no_variant_is_refused():
    assert "variant 2 is 3" in problems({}, [{"a": 1}, 3])[0]
    assert "a stands in search and in variant 1" in problems({"a": {"choice": [1]}}, [{"a": 2}])[0]


def test_all_that_is_wrong_is_said_at_once():
    assert len(problems({"a": 3, "b": {"choice": []}, "c": {"when": {"a": 1}, "grid": [1]}})) == 2
