"""Run files and words become arguments; what is wrong with them is said at once."""

import json
import pickle

import pytest

from llmray.arguments.loading import load, replace
from llmray.arguments.run import DEFAULTS, FIELDS, GROUPS, RunArguments
from llmray.errors import ArgumentsError

TRAINING = {
    "model_name_or_path": "models/base",
    "dataset": "a,b",
    "output_dir": "out",
    "do_train": True,
}


def run(*words, **keys):
    return load(TRAINING | keys, words, environ={})


def problems(source, words=(), environ=None):
    with pytest.raises(ArgumentsError) as error:
        load(source, words, environ=environ or {})
    assert error.value.exit_code == 2
    return str(error.value)


def test_every_key_belongs_to_one_group():
    assert sum(len(group.model_fields) for group in GROUPS.values()) == len(FIELDS)


def test_defaults_are_those_of_a_file_that_gives_nothing():
    arguments = load({"model_name_or_path": "m"}, environ={})
    flat = arguments.flat()
    assert {key for key in flat if flat[key] != json.loads(json.dumps(DEFAULTS[key]))} == {
        "model_name_or_path"
    }


@pytest.mark.parametrize("value", ["1e-4", 1e-4, "0.0001", ".0001"])
def test_numbers_may_be_text(value):
    assert run(learning_rate=value).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("cutoff_len", "1e3", 1000),
        ("cutoff_len", "512", 512),
        ("val_size", "0.1", 0.1),
        ("val_size", "1", 1),
        ("val_size", 2.0, 2),
        ("plot_loss", "true", True),
        ("plot_loss", "False", False),
        ("plot_loss", "lr, grad_norm", ("lr", "grad_norm")),
        ("plot_loss", ["lr"], ("lr",)),
        ("save_steps", "0.25", 0.25),
        ("save_steps", "100", 100),
        ("dataset", "a, b ,c", ("a", "b", "c")),
        ("dataset", ["a", "b"], ("a", "b")),
        ("eval_dataset", None, ()),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "out/checkpoint-5", "out/checkpoint-5"),
        ("resume_from_checkpoint", None, None),
        ("resources_per_worker", '{"CPU": 1, "GPU": 0.5}', {"CPU": 1, "GPU": 0.5}),
        ("resources_per_worker", {"CPU": 1}, {"CPU": 1}),
        ("save_strategy", False, "no"),
        ("ray_run_name", 2024, "2024"),
    ],
)
def test_forms_of_values(key, text, value):
    flat = run(**{key: text}).values()
    assert flat[key] == value
    assert type(flat[key]) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "required"),
    [
        ("learning_rate", "fast", "a number, at least 0"),
        ("learning_rate", True, "a number, at least 0"),
        ("learning_rate", float("nan"), "a number, at least 0"),
        ("cutoff_len", 0, "a whole number, at least 1"),
        ("cutoff_len", 1.5, "a whole number, at least 1"),
        ("cutoff_len", None, "a whole number, at least 1"),
        ("lora_dropout", 1, "at least 0 and below 1"),
        ("val_size", 1.0, "(1.0 is a share, of all rows; one row is written 1)"),
        ("val_size", "1.0", "(1.0 is a share, of all rows; one row is written 1)"),
        ("val_size", 1.5, "a share below 1 or a whole number"),
        ("val_size", -0.1, "a share below 1 or a whole number"),
        ("plot_loss", 3, "true, false or a list of names"),
        ("mask_history", "perhaps", "true or false"),
        ("dataset", 3, "a list of names"),
        ("resources_per_worker", "GPU", "a mapping or a JSON object"),
        ("resources_per_worker", "{GPU: 1", "a mapping or a JSON object"),
        ("top_p", 0, "above 0 and at most 1"),
        ("dpo_label_smoothing", 0.6, "at most 0.5"),
        ("placement_strategy", "PACKED", "Did you mean PACK?"),
        ("stage", "xyz", "one of pt, sft, rm, ppo, dpo, kto"),
        ("pref_loss", "foo", "one of sigmoid, hinge, ipo, kto_pair, orpo, simpo"),
        ("quantization_method", "gptq", "A checkpoint in that format is recognised by itself"),
        ("master_port", 70000, "at most 65535"),
        ("ray_run_name", "a/b", "it is one part of a path"),
        ("ray_run_name", "..", "it is one part of a path"),
        ("output_dir", "", "text, not empty"),
    ],
)
def test_wrong_values_name_key_value_and_what_is_required(key, value, required):
    text = problems(TRAINING | {key: value})
    assert key in text
    assert required in text
    assert "\n" not in text  # one problem, and no other that follows from it


def test_a_secret_stays_hidden_when_it_is_wrong():
    text = problems(TRAINING | {"hf_hub_token": ["hush-hush"]})
    assert "hf_hub_token" in text
    assert "hush" not in text


def test_all_problems_are_said_at_once():
    text = problems(
        {"lora_rnk": 8, "learning_rate": "fast", "bf16": True, "fp16": True, "use_muon": True},
        ["cutoff_len=0", "word", "--nonsense", "5"],
    )
    for part in (
        "8 problems",
        "Did you mean lora_rank?",
        "learning_rate=fast",
        "cutoff_len=0",
        "'word'",
        "nonsense is no key",
        "bf16=true with fp16=true",
        "model_name_or_path is not given",
        "use_muon=true",
    ):
        assert part in text


def test_unknown_keys_are_left_out_on_request(caplog):
    arguments = load(TRAINING | {"lora_rnk": 8}, environ={"ALLOW_EXTRA_ARGS": "1"})
    assert arguments == load(TRAINING, environ={})
    assert "lora_rnk" in caplog.text


def test_references_are_not_expanded_and_said_so():
    text = problems(TRAINING | {"output_dir": "${oc.env:HOME}/out"})
    assert "${oc.env:HOME} is not expanded" in text
    assert run(default_system="It costs $5 {sic}").data.default_system


def test_a_ratio_beside_warmup_steps_is_remarked(caplog):
    run(warmup_steps=10, warmup_ratio=0.1)
    assert "warmup_steps=10 goes before warmup_ratio=0.1" in caplog.text


def test_words_go_before_the_file_and_the_file_before_the_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ncutoff_len: 64\nlora_rank: 4\n")
    arguments = load(path, ["cutoff_len=32"], environ={})
    assert arguments.data.cutoff_len == 32
    assert arguments.finetuning.lora_rank == 4
    assert arguments.optimizer.learning_rate == 5e-5


def test_an_alias_in_words_goes_before_the_key_in_the_file():
    arguments = run("evaluation_strategy=steps", eval_strategy="epoch", val_size=0.1)
    assert arguments.training.eval_strategy == "steps"


def test_what_is_saved_loads_to_an_equal_object(tmp_path):
    arguments = run(
        additional_target="embed_tokens,lm_head",
        default_system="Say: yes, or # no",
        resources_per_worker={"CPU": 1},
        use_ray=False,
        val_size=0.1,
        learning_rate="1e-4",
        ray_run_name="2024",
    )
    arguments.save(tmp_path / "run_arguments.yaml")
    assert load(tmp_path / "run_arguments.yaml", environ={"USE_RAY": "1"}) == arguments


def test_secrets_are_left_out_of_everything_that_is_written(tmp_path):
    arguments = run(hf_hub_token="hush-hush")
    assert arguments.model.hf_hub_token.get_secret_value() == "hush-hush"
    assert replace(arguments, lora_rank=4).model.hf_hub_token == arguments.model.hf_hub_token
    assert "hf_hub_token" not in arguments.flat()
    arguments.save(tmp_path / "run_arguments.yaml")
    written = (tmp_path / "run_arguments.yaml").read_text() + repr(arguments) + str(arguments)
    assert "hush" not in written
    loaded = load(tmp_path / "run_arguments.yaml", environ={})
    assert loaded == replace(arguments, hf_hub_token=None)


def test_flat_is_json():
    arguments = run(resources_per_worker={"CPU": 1})
    assert json.loads(json.dumps(arguments.flat())) == arguments.flat()


def test_replace_checks_its_values():
    arguments = run()
    assert replace(arguments, seed=7).training.seed == 7
    assert arguments.training.seed == 42
    with pytest.raises(ArgumentsError, match="sed is no key"):
        replace(arguments, sed=7)
    with pytest.raises(ArgumentsError, match="bf16=true with fp16=true"):
        replace(arguments, bf16=True, fp16=True)


def test_arguments_are_frozen_and_picklable():
    arguments = run()
    with pytest.raises(ValueError, match="frozen"):
        arguments.training.seed = 1
    assert pickle.loads(pickle.dumps(arguments)) == arguments


@pytest.mark.parametrize(
    ("keys", "environ", "enabled"),
    [
        ({}, {}, False),
        ({"use_ray": True}, {}, True),
        ({}, {"USE_RAY": "1"}, True),
        ({}, {"USE_RAY": "0"}, False),
        ({"use_ray": False}, {"USE_RAY": "1"}, False),
        ({"use_ray": False, "ray_num_workers": 2}, {}, False),
        ({"ray_num_workers": 1}, {}, True),
        ({"ray_run_name": "x"}, {}, True),
        ({"ray_storage_path": "s"}, {}, True),
        ({"resources_per_worker": {"GPU": 1}}, {}, True),
        ({"placement_strategy": "PACK"}, {}, True),
        ({"ray_num_workers": 2}, {"USE_RAY": "0"}, False),
        ({"ray_max_failures": 1}, {}, False),
    ],
)
def test_ray_is_enabled(keys, environ, enabled):
    assert load(TRAINING | keys, environ=environ).ray_enabled is enabled


def test_not_given_keeps_its_documented_meaning():
    cluster = RunArguments().cluster
    assert (cluster.num_workers, cluster.resources, cluster.storage_path, cluster.strategy) == (
        1,
        {"GPU": 1},
        "./saves",
        "PACK",
    )
