"""The section tune: what it comes to, and everything that is refused before a trial starts."""

import pytest

from llmray.arguments.loading import load, replace
from llmray.arguments.tune import sweep_of
from llmray.errors import ArgumentsError
from llmray.sweep.trials import trials_of

RUN = {
    "model_name_or_path": "m",
    "dataset": "a",
    "stage": "sft",
    "do_train": True,
    "output_dir": "o",
    "finetuning_type": "lora",
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 5,
}
RATES = {"learning_rate": {"loguniform": [1e-5, 1e-3]}}
GRID = {"learning_rate": {"grid": [1e-5, 1e-3]}, "lora_rank": {"choice": [4, 8]}}


def sweep(section, **keys):
    return sweep_of(load(RUN | keys | {"tune": section}, environ={}))


def refused(section, **keys):
    with pytest.raises(ArgumentsError) as error:
        load(RUN | keys | {"tune": section}, environ={})
    return str(error.value)


def test_what_is_not_given_follows_from_the_run():
    found = sweep({"search": RATES}, seed=7)
    assert (found.searcher, found.num_samples, found.seed) == ("random", 8, 7)
    assert (found.metric, found.mode) == ("eval_loss", "min")
    assert (found.scheduler.kind, found.max_concurrent, found.time_budget_s) == ("none", None, None)


def test_values_that_are_all_listed_make_a_grid_unless_a_number_is_asked_for():
    assert sweep({"search": GRID}).searcher == "grid"
    assert sweep({"search": GRID, "num_samples": 2}).searcher == "random"
    assert sweep({"search": {"lora_rank": {"randint": [4, 8]}}, "num_samples": 2}).num_samples == 2


@pytest.mark.parametrize(
    ("keys", "section", "metric", "mode"),
    [
        ({"stage": "dpo"}, {}, "eval_rewards/accuracies", "max"),
        ({"stage": "rm"}, {}, "eval_loss", "min"),
        ({"stage": "rm"}, {"metric": "accuracy"}, "eval_accuracy", "max"),
        ({"stage": "dpo"}, {"metric": "eval_rewards/margins"}, "eval_rewards/margins", "max"),
        ({"stage": "dpo"}, {"metric": "kl"}, "eval_kl", "min"),
        ({"stage": "dpo"}, {"metric": "kl", "mode": "max"}, "eval_kl", "max"),
        ({"metric_for_best_model": "loss"}, {}, "eval_loss", "min"),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, {}, "eval_loss", "max"),
        (
            {"compute_accuracy": True, "metric_for_best_model": "accuracy"},
            {},
            "eval_accuracy",
            "max",
        ),
        ({"predict_with_generate": True}, {"metric": "rouge-l"}, "eval_rouge-l", "max"),
    ],
)
def test_the_metric_is_that_of_the_sweep_the_run_or_the_stage(keys, section, metric, mode):
    found = sweep({"search": RATES, **section}, **keys)
    assert (found.metric, found.mode) == (metric, mode)


def test_less_or_more_is_better_as_the_mode_says():
    assert sweep({"search": RATES}).is_better(1.0, than=2.0)
    assert not sweep({"search": RATES, "mode": "max"}).is_better(1.0, than=2.0)


def test_a_scheduler_has_its_own_settings():
    found = sweep({"search": RATES, "scheduler": {"asha": {"grace_period": 5}}}).scheduler
    assert found.kind == "asha"
    expected = {"grace_period": 5, "reduction_factor": 4, "brackets": 1}
    assert found.settings == {**expected, "time_attr": "current_steps"}
    assert sweep({"search": RATES, "scheduler": "median"}).scheduler.settings["hard_stop"] is True


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"time_attr": "time_total_s", "max_t": 60}, {}),
        ({"time_attr": "epoch"}, {"num_train_epochs": 3}),
        ({"time_attr": "epoch", "reduction_factor": 2}, {"num_train_epochs": 2}),
        ({"time_attr": "epoch"}, {"num_train_epochs": 1, "max_steps": 90}),
        ({}, {"num_train_epochs": 1}),
    ],
)
def test_hyperband_is_taken_where_it_may_compare(settings, keys):
    section = {"search": RATES, "scheduler": {"hyperband": settings}}
    assert sweep(section, **keys).scheduler.kind == "hyperband"


@pytest.mark.parametrize(
    ("kind", "rest"),
    [("grid", {**RATES}), ("choice", {})],  # with a draw beside; all of it a grid
)
def test_a_grid_may_depend_on_what_is_no_draw(kind, rest):
    search = {
        "finetuning_type": {kind: ["lora", "freeze"]},
        "lora_rank": {"grid": [4, 8], "when": {"finetuning_type": "lora"}},
    }
    found = trials_of(sweep({"search": search | rest, **({"num_samples": 2} if rest else {})}))
    ranks = [trial.values.get("lora_rank") for trial in found]
    assert sorted(str(rank) for rank in ranks) == sorted(["4", "8", "None"] * (2 if rest else 1))


def test_the_section_may_be_json_on_the_command_line():
    words = ['tune={"search": {"learning_rate": {"loguniform": [1e-05, 0.001]}}}']
    [dimension] = sweep_of(load(RUN, words, environ={})).space.dimensions
    assert (dimension.distribution.low, dimension.distribution.high) == (1e-5, 1e-3)


def test_a_run_file_with_a_section_is_written_and_read_again(tmp_path):
    arguments = load(RUN | {"tune": {"search": GRID, "scheduler": "asha"}}, environ={})
    arguments.save(tmp_path / "run.yaml")
    assert load(tmp_path / "run.yaml", environ={}) == arguments


REFUSED = [
    # form
    ({"serch": RATES}, {}, "serch is no key of tune. Did you mean search?"),
    ({"search": RATES, "num_sample": 2}, {}, "Did you mean num_samples?"),
    ({"search": RATES, "num_samples": 0}, {}, "num_samples=0 is wrong"),
    ({"search": RATES, "searcher": "optune"}, {}, "Did you mean optuna?"),
    ({"search": RATES, "mode": "least"}, {}, "one of min, max"),
    ({"search": 3}, {}, "search=3 is wrong"),
    ({"variants": 3}, {}, "a list of mappings"),
    ({"num_samples": 3}, {}, "neither search nor variants"),
    # schedulers
    ({"search": RATES, "scheduler": "ashha"}, {}, "Did you mean asha?"),
    ({"search": RATES, "scheduler": "pbt"}, {}, "which the training inside a trial never sees"),
    ({"search": RATES, "scheduler": {"asha": {}, "median": {}}}, {}, "one name with its settings"),
    ({"search": RATES, "scheduler": {"asha": 3}}, {}, "a mapping of its settings"),
    ({"search": RATES, "scheduler": {"asha": {"grace_perid": 3}}}, {}, "Did you mean grace_pe"),
    ({"search": RATES, "scheduler": {"asha": {"max_t": 0}}}, {}, "max_t=0 is wrong"),
    ({"search": RATES, "scheduler": {"median": {"metric": "x"}}}, {}, "Write metric beside"),
    ({"search": RATES, "scheduler": {"none": {"max_t": 3}}}, {}, "It takes none"),
    (
        {"search": RATES, "scheduler": {"asha": {"max_t": 20, "grace_period": 50}}},
        {},
        "grace_period=50 is behind max_t=20",
    ),
    (
        {"search": RATES, "scheduler": {"hyperband": {"time_attr": "time_total_s"}}},
        {},
        "Write max_t: the seconds",
    ),
    (
        {"search": RATES, "scheduler": {"hyperband": {"time_attr": "epoch"}}},
        {"num_train_epochs": 1},
        "with num_train_epochs=1 and reduction_factor=3 there is nothing before the end",
    ),
    ({"search": RATES, "scheduler": {"hyperband": {"max_t": 2}}}, {}, "with max_t=2"),
    ({"search": RATES, "scheduler": "hyperband"}, {"max_steps": 2}, "with max_steps=2"),
    # keys
    ({"search": {"learning_rat": {"choice": [1]}}}, {}, "Did you mean learning_rate?"),
    ({"variants": [{"learning_rat": 1}]}, {}, "Did you mean learning_rate?"),
    ({"search": {"output_dir": {"choice": ["a"]}}}, {}, "output_dir cannot be searched"),
    ({"search": {"use_ray": {"choice": [True]}}}, {}, "the same for all trials"),
    # ranges and choices outside of the argument's own
    ({"search": {"warmup_ratio": {"uniform": [0, 2]}}}, {}, "warmup_ratio=2 is wrong"),
    ({"search": {"lora_rank": {"choice": [0, 4]}}}, {}, "lora_rank=0 is wrong"),
    ({"search": {"lora_rank": {"randint": [0, 4]}}}, {}, "lora_rank=0 is wrong"),
    ({"search": {"finetuning_type": {"choice": ["lora", "lra"]}}}, {}, "Did you mean lora?"),
    ({"variants": [{"lora_rank": 0}]}, {}, "lora_rank=0 is wrong"),
    ({"search": {"stage": {"uniform": [0, 1]}}}, {}, "stage has no range"),
    ({"search": {"lora_rank": {"uniform": [4, 8]}}}, {}, "draws fractions"),
    ({"search": {"lora_rank": {"quniform": [4, 8, 0.5]}}}, {}, "draws fractions"),
    ({"search": {"save_steps": {"uniform": [0.5, 8]}}}, {}, "draws fractions"),
    # what does not go together in a trial
    (
        {"search": {"lr_scheduler_type": {"choice": ["cosine", "cosine_with_min_lr"]}}},
        {},
        "requires one of min_lr and min_lr_rate",
    ),
    (
        {"search": {"a_": {"choice": [1]}, "lora_rank": {"choice": [0]}}},
        {},
        "2 problems",
    ),
    # what a searcher that learns may propose
    (
        {
            "search": {
                "finetuning_type": {"choice": ["lora", "full"]},
                "quantization_bit": {"choice": [None, 4]},
            },
            "num_samples": 4,
            "searcher": "optuna",
        },
        {},
        "quantization_bit",
    ),
    (
        {"search": {"eval_steps": {"randint": [1, 10]}}, "searcher": "optuna"},
        {"save_steps": 10, "load_best_model_at_end": True},
        "load_best_model_at_end",
    ),
    # metric
    ({"search": RATES, "metric": "rouge-1"}, {}, "eval_rouge-1 is never logged"),
    ({"search": RATES, "metric": "los"}, {}, "Write eval_loss."),
    ({"search": RATES, "metric": "accuracy"}, {}, "Write compute_accuracy: true"),
    ({"search": RATES}, {"eval_strategy": "no"}, "nothing is evaluated"),
    ({"search": RATES}, {"do_train": False, "eval_strategy": "no"}, "do_train=false"),
    (
        {"search": {"pref_loss": {"choice": ["sigmoid", "orpo"]}}, "metric": "kl"},
        {"stage": "dpo"},
        "a trial with pref_loss=orpo: metric=eval_kl is never logged",
    ),
    # a loss that says nothing
    (
        {"search": {"pref_beta": {"uniform": [0.05, 0.5]}}, "metric": "loss"},
        {"stage": "dpo"},
        "Write metric: eval_rewards/accuracies, mode: max.",
    ),
    (
        {"search": {"pref_beta": {"uniform": [0.05, 0.5]}}, "metric": "rewards/margins"},
        {"stage": "dpo"},
        "a multiple of pref_beta itself",
    ),
    (
        {"search": {"pref_beta": {"choice": [0.1, 0.2]}}},
        {"stage": "kto"},
        "Stage kto logs nothing that compares them",
    ),
    # a grid that a draw decides on
    (
        {
            "search": {
                "finetuning_type": {"choice": ["lora", "freeze"]},
                "lora_rank": {"grid": [4, 8], "when": {"finetuning_type": "lora"}},
                **RATES,
            },
            "num_samples": 3,
        },
        {},
        "Write grid for finetuning_type, or choice for lora_rank.",
    ),
    # numbers of trials
    ({"search": RATES, "searcher": "grid"}, {}, "a grid needs values that can be counted"),
    ({"search": GRID, "searcher": "grid", "num_samples": 2}, {}, "2 times alike"),
    ({"search": {"lora_rank": {"choice": [4, 8]}}, "num_samples": 3}, {}, "there are 2 different"),
    ({"search": GRID, "num_samples": 3}, {}, "asks for 6 trials, but there are 4"),
    (
        {"search": {"lora_rank": {"randint": [4, 8]}}, "num_samples": 6, "searcher": "optuna"},
        {},
        "Write num_samples: 5",
    ),
]


@pytest.mark.parametrize(("section", "keys", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(section, keys, said):
    assert said in refused(section, **keys)


def test_everything_is_said_at_once_and_each_thing_once():
    text = refused(
        {
            "search": {
                "learning_rat": {"loguniform": [1e-5, 1e-3]},
                "lora_rank": {"choice": [0, 8]},
                "stage": {"uniform": [0, 1]},
                "lora_alpha": {"uniform": [4, 8]},
            },
            "scheduler": "ashha",
        }
    )
    assert "5 problems" in text
    assert text.count("lora_rank=0") == 1


def test_what_the_run_itself_has_wrong_is_said_once_and_not_of_trials():
    text = refused({"search": GRID}, warmup_ratio=3)
    assert text.count("warmup_ratio") == 1
    assert "trial" not in text


def test_a_combination_that_one_trial_alone_has_is_found():
    search = {
        "lr_scheduler_type": {"choice": ["linear", "polynomial"]},
        "lr_scheduler_kwargs": {
            "choice": [{"power": 2.0}],
            "when": {"lr_scheduler_type": "polynomial"},
        },
    }
    assert sweep({"search": search}).searcher == "grid"
    del search["lr_scheduler_kwargs"]["when"]
    assert "power is no setting of lr_scheduler_type=linear" in refused({"search": search})


def test_a_search_over_what_is_evaluated_is_remarked(caplog):
    with caplog.at_level("WARNING", logger="llmray"):
        sweep({"search": {"cutoff_len": {"choice": [128, 256]}}})
    assert "cutoff_len also changes what is evaluated" in caplog.text


def test_other_names_of_keys_and_values_are_searched_too():
    assert sweep({"variants": [{"finetuning_type": "qlora"}, {"finetuning_type": "lora"}]})


def test_arguments_with_a_section_can_be_changed():
    arguments = load(RUN | {"tune": {"search": GRID}}, environ={})
    assert replace(arguments, seed=3).training.seed == 3


def test_reward_models_of_a_searcher_that_learns_are_known_before():
    keys = {"stage": "ppo", "reward_model": "rm", "reward_model_type": "full"}
    search = {"reward_batch_tokens": {"randint": [512, 4096]}}
    said = refused({"search": search, "searcher": "optuna"}, **keys)
    assert "searcher=optuna with reward_batch_tokens" in said
    assert "Write choice with a list" in said
    search = {"reward_batch_tokens": {"choice": [512, 4096]}, **RATES}
    sweep({"search": search, "searcher": "optuna"}, **keys)
    sweep({"search": {"reward_batch_tokens": {"randint": [512, 4096]}}}, **keys)
    function = {**keys, "reward_model": "rewards:score"}
    search = {"reward_batch_tokens": {"randint": [512, 4096]}}
    sweep({"search": search, "searcher": "optuna"}, **function)
    search["reward_model"] = {"choice": ["rewards:score", "rm"]}
    assert "makes reward models" in refused({"search": search, "searcher": "optuna"}, **function)
