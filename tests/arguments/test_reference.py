"""The reference is rendered from the declarations, and what is committed is current."""

import json
import subprocess
import sys

import pytest

from llmray.arguments import reference
from llmray.arguments.run import FIELDS
from llmray.errors import ArgumentsError

REGENERATE = "Run python -m llmray.arguments.reference."


def test_the_committed_documents_are_current():
    assert (reference.DOCS / "arguments.md").read_text() == reference.markdown(), REGENERATE
    schema = (reference.DOCS / "arguments.schema.json").read_text()
    assert schema == reference.json_schema() + "\n", REGENERATE


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_described(key):
    description = FIELDS[key].description
    assert description
    assert description[0].isupper() or description[0].isdigit()
    assert description.endswith(".")
    assert len(description) < 250
    assert description in " ".join(reference.describe([key]).split())


def test_all_keys_are_listed():
    listed = reference.describe().split()
    assert set(FIELDS) <= set(listed)


def test_a_key_in_words():
    text = reference.describe(["lora_dropout", "use_cache", "no_cuda", "save_safetensors"])
    assert "takes: a number, at least 0 and below 1" in text
    assert "use_kv_cache (also use_cache)" in text
    assert "use_cpu: true" in text
    assert "no longer a key" in text


def test_an_unknown_key_is_said_with_the_nearest():
    with pytest.raises(ArgumentsError, match="Did you mean lora_rank"):
        reference.describe(["lora_rnk"])


def test_the_schema_says_types_limits_and_choices():
    properties = json.loads(reference.json_schema())["properties"]
    assert set(FIELDS) <= set(properties)
    assert properties["lora_rank"] | {"description": ""} == {
        "description": "",
        "type": "integer",
        "minimum": 1,
        "default": 8,
    }
    assert properties["lora_dropout"]["exclusiveMaximum"] == 1
    assert properties["infer_dtype"]["enum"] == ["auto", "float16", "bfloat16", "float32"]
    assert properties["dataset"]["type"] == ["array", "string"]
    assert properties["resources_per_worker"]["type"] == ["object", "string", "null"]
    assert properties["use_cache"]["deprecated"] is True


def test_the_schema_takes_run_files_and_refuses_mistakes():
    from jsonschema import Draft202012Validator

    schema = json.loads(reference.json_schema())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(
        {
            "model_name_or_path": "m",
            "dataset": "a,b",
            "lora_target": ["q_proj"],
            "learning_rate": 1e-4,
            "bf16": None,
            "resume_from_checkpoint": True,
            "resources_per_worker": {"GPU": 1},
            "placement_strategy": None,
        }
    )
    section = {"search": {"lora_rank": {"choice": [4]}}, "scheduler": {"asha": {}}, "variants": []}
    assert validator.is_valid({"tune": section | {"num_samples": 3, "mode": "max"}})
    assert not validator.is_valid({"tune": section | {"num_sample": 3}})
    assert not validator.is_valid({"tune": section | {"searcher": "optune"}})
    for mistake in ({"lora_rnk": 8}, {"lora_rank": 0}, {"stage": "xyz"}, {"plot_loss": 3}):
        assert not validator.is_valid(mistake)


def test_arguments_import_no_library_of_machine_learning():
    heavy = ("torch", "transformers", "peft", "datasets", "accelerate", "ray", "numpy", "pyarrow")
    code = (
        "import sys; from llmray.arguments import paths, reference, run; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
