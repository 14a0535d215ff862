"""What an estimate takes for trained, beside what peft makes."""

import pytest
from tiny import build_model, make_model
from tuned import KEYS, tuned

from llmray.arguments.loading import load
from llmray.model import architecture, trained, tuning


@pytest.mark.parametrize(
    ("target", "most"),
    [
        ("all", 1.2),  # a router has a matrix too, which is no linear module
        (r".*layers\.1\..*_proj", 1.4),
        # in files an expert's two inner matrices are apart, so their inputs count twice
        ("all,experts", 1.4),
        ("experts.down_proj", 1.0),
        ("gate_up_proj", 1.5),
    ],
)
def test_an_adapter_of_a_mixture_has_as_many_values_as_peft_makes(target, most, tmp_path):
    keys = {"lora_target": target, "lora_rank": 4}
    make_model(tmp_path, "qwen3_moe")
    model = architecture.decoder(architecture.read_config(tmp_path))
    table = architecture.shapes(tmp_path)
    found = trained.what_trains(load({**KEYS, **keys}).finetuning, model, table)
    made = tuning.trainable(tuned(build_model("qwen3_moe"), **keys))
    number = sum(parameter.numel() for parameter in made.values())
    assert number <= found.num_adapter <= most * number
