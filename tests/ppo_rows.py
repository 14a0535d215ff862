"""Keys of stage ppo: two values of each, and what else the run needs for them to differ.

    for key, row in {**PARTS, **RUNS}.items(): {**BASE, **row.keys, key: row.first}

What a run logs beside what a clock says differs in all of them. `PARTS` are settings of a step, so
they show in its parts before anything runs; `RUNS` must be run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmray.train.observers import read_log

Keys = dict[str, Any]

BASE: Keys = {
    "stage": "ppo",
    "reward_model": "letter_rewards:share_of_e",
    "max_new_tokens": 4,
    "top_p": 1.0,
    "top_k": 0,
    "temperature": 1.0,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "ppo_epochs": 1,
    "learning_rate": 0.05,
    "ppo_init_kl": 0.5,
    "disable_gradient_checkpointing": True,
}
TWICE = {"ppo_epochs": 2, "learning_rate": 0.5}  # a second pass finds a policy that has moved
ODD = "letter_rewards:refused_where_odd"
TWO = "letter_rewards:share_of_e,letter_rewards:length"


@dataclass(frozen=True)
class PpoRow:
    """Two values of a key, `...` leaves it away; and what else the run needs."""

    first: Any
    second: Any
    keys: Keys = field(default_factory=dict)


PARTS: dict[str, PpoRow] = {
    "ppo_epochs": PpoRow(1, 2),
    "ppo_score_norm": PpoRow(False, True, {"reward_model": "letter_rewards:length"}),
    "ppo_target": PpoRow(1e-6, 1000.0, {"max_steps": 3, "ppo_kl_horizon": 10.0}),
    "ppo_whiten_rewards": PpoRow(False, True),
    "ppo_num_samples": PpoRow(1, 2),
    "ppo_clip_range": PpoRow(0.01, 0.5, TWICE),
    "ppo_value_clip_range": PpoRow(0.001, 0.5, TWICE),
    "ppo_value_coef": PpoRow(0.1, 0.5),
    "ppo_entropy_coef": PpoRow(0.0, 0.5),
    "ppo_gamma": PpoRow(1.0, 0.5),
    "ppo_lambda": PpoRow(0.95, 0.1),
    "ppo_init_kl": PpoRow(0.1, 1.0),
    "ppo_kl_control": PpoRow("adaptive", "fixed"),
    "ppo_kl_horizon": PpoRow(10.0, 1000.0),
    "ppo_kl_estimator": PpoRow("k1", "k3"),
    "ppo_early_stop_kl": PpoRow(..., 1e-6, TWICE),
    "ppo_missing_eos_penalty": PpoRow(..., 1.0),
    "reward_weights": PpoRow("1,1", "1,2", {"reward_model": TWO}),
}
API = {"reward_model_type": "api", "reward_model": "http://127.0.0.1:1/score"}
MODEL = {"reward_model_type": "full", "reward_model": "scores"}
# of these nothing that is logged differs, but who is asked for scores, how, and what is written
PARTS |= {
    "ppo_rollout_batch_size": PpoRow(2, 3),
    "rollout_log_steps": PpoRow(1, 2),
    "reward_timeout_s": PpoRow(10.0, 20.0),
    "reward_request_timeout_s": PpoRow(10.0, 20.0),
    "reward_error": PpoRow("fail", "mask"),
    "reward_batching": PpoRow("arrival", "fixed"),
    "reward_batch_tokens": PpoRow(100, 200),
    "reward_num_retries": PpoRow(1, 2, API),
    "reward_num_requests": PpoRow(1, 2, API),
    "reward_model_type": PpoRow("lora", "full", {"reward_model": "scores"}),
    "reward_model_adapters": PpoRow(..., ["one"], MODEL),
    "reward_model_quantization_bit": PpoRow(..., 4, MODEL),
}
RUNS: dict[str, PpoRow] = {
    "ppo_buffer_size": PpoRow(1, 2, {"max_steps": 1}),
    "advantage_estimator": PpoRow("gae", "grpo", {"ppo_num_samples": 2, "max_steps": 1}),
    "reward_model": PpoRow("letter_rewards:share_of_e", TWO, {"max_steps": 1}),
    "reward_error_value": PpoRow(
        0.0, 5.0, {"reward_model": ODD, "reward_error": "value", "max_steps": 1}
    ),
}


def told(output: Path) -> list[Keys]:
    """What a run logged, without what a clock says."""
    return [
        {
            name: value
            for name, value in record.items()
            if not name.startswith(("share_", "idle_"))
            and "time" not in name
            and "second" not in name
        }
        for record in read_log(output / "trainer_log.jsonl")
    ]
