"""Runs inside the peer's environment: TRL's DPOTrainer on the token ids that LLaMA-Factory makes.

    PEER/venv/bin/python benchmarks/trl_dpo.py run.yaml

Reads the keys of `dpo_vs_peer.py`'s run file; an update's line is written as `peer_probe.py` does.
TRL 0.24 beside transformers 5 needs LLaMA-Factory's repair of transformers, and one attribute that
models have lost.
"""

import sys

import llamafactory.train.tuner  # noqa: F401 -- repairs transformers' search for packages
import peer_probe
import yaml
from datasets import Dataset
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


class TokenizedTrainer(DPOTrainer):
    """The trainer without its tokenization."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def rows(run):
    """The tokenizer, and prompt and answers of each pair as LLaMA-Factory cuts them."""
    model, data, training, _, _ = get_train_args(dict(run))
    loaded = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
    found = get_dataset(template, model, data, training, stage="rm", **loaded)["train_dataset"]
    made = []
    for row in found:
        start = sum(1 for label in row["chosen_labels"] if label == IGNORED)
        made.append(
            {
                "prompt_input_ids": row["chosen_input_ids"][:start],
                "chosen_input_ids": row["chosen_input_ids"][start:],
                "rejected_input_ids": row["rejected_input_ids"][start:],
            }
        )
    return loaded["tokenizer"], Dataset.from_list(made)


def main():
    """Train as the run file says."""
    with open(sys.argv[1]) as file:
        run = yaml.safe_load(file)
    tokenizer, data = rows(run)
    recomputes = not run.get("disable_gradient_checkpointing", False)
    set_seed(run["seed"])
    model = AutoModelForCausalLM.from_pretrained(run["model_name_or_path"], dtype="float32")
    model.warnings_issued = {}
    settings = DPOConfig(
        output_dir=run["output_dir"],
        max_steps=run["max_steps"],
        per_device_train_batch_size=run["per_device_train_batch_size"],
        gradient_accumulation_steps=run["gradient_accumulation_steps"],
        learning_rate=run["learning_rate"],
        lr_scheduler_type=run["lr_scheduler_type"],
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        seed=run["seed"],
        report_to="none",
        bf16=False,
        fp16=False,
        beta=run["pref_beta"],
        loss_type=run["pref_loss"],
        max_length=run["cutoff_len"],
        max_prompt_length=None,
        gradient_checkpointing=recomputes,
        use_cpu=True,
        dataloader_num_workers=0,
    )
    rank = run["lora_rank"]
    adapter = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    peer_probe.install()
    trainer = TokenizedTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()


if __name__ == "__main__":
    main()
