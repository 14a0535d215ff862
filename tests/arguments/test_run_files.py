"""Run files as users of LLaMA-Factory write them load, or fail only for what is not built yet."""

import pytest

from llmray.arguments.capabilities import COMBINATIONS_NOT_BUILT, NOT_BUILT
from llmray.arguments.loading import load
from llmray.errors import ArgumentsError

COMMON = """
model_name_or_path: org/Some-4B-Instruct
trust_remote_code: true
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/some-4b/run
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
RAY = """
ray_run_name: some_4b_sft
ray_storage_path: ./saves
ray_num_workers: 4
placement_strategy: PACK
resources_per_worker:
  GPU: 1
"""
LOADS = {
    "sft": "stage: sft\n" + COMMON,
    "pretrain": "stage: pt\n" + COMMON,
    "ray": "stage: sft\noverwrite_cache: true\n" + COMMON + RAY,
    "full": COMMON.replace("lora\nlora_rank: 8\nlora_target: all", "full"),
    "evaluated": COMMON + "val_size: 0.1\nper_device_eval_batch_size: 1\neval_strategy: steps\n"
    "eval_steps: 500\n",
    "tokenized": COMMON + "tokenized_path: saves/dataset\n",
    "swanlab": COMMON + "use_swanlab: true\nswanlab_run_name: some\n",
    "pissa": COMMON + "pissa_init: true\npissa_iter: 16\npissa_convert: true\n",
    "lora plus": COMMON + "loraplus_lr_ratio: 16.0\nuse_rslora: true\nuse_dora: true\n",
    "low bit": COMMON + "quantization_bit: 4\nquantization_method: bnb\n",
    "low bit, as documented": COMMON + "quantization_bit: 8\nquantization_method: bitsandbytes\n",
    "export": "model_name_or_path: org/Some-4B\nadapter_name_or_path: saves/run\n"
    "template: llama3\nexport_dir: saves/merged\nexport_size: 5\nexport_device: cpu\n"
    "export_legacy_format: false\n",
    "predict": "model_name_or_path: org/Some-4B\nstage: sft\ndo_predict: true\n"
    "finetuning_type: full\neval_dataset: a\npredict_with_generate: true\noutput_dir: saves/p\n"
    "per_device_eval_batch_size: 1\n",
    "chat": "model_name_or_path: org/Some-4B\nadapter_name_or_path: saves/run\ntemplate: llama3\n"
    "infer_backend: huggingface\ntrust_remote_code: true\n",
    "rm": COMMON + "stage: rm\n",
    "dpo": COMMON + "stage: dpo\npref_beta: 0.1\npref_loss: sigmoid\n",
    "kto": COMMON + "stage: kto\npref_beta: 0.1\n",
    "ppo": COMMON + "stage: ppo\nreward_model: saves/reward\nmax_new_tokens: 512\ntop_k: 0\n"
    "top_p: 0.9\n",
}
LOADS["remote data"] = LOADS["sft"] + "dataset_dir: REMOTE:org/demo_data\n"
LOADS["ppo on ray"] = COMMON + "stage: ppo\nreward_model: saves/reward\n" + RAY
FAILS = {
    "deepspeed": COMMON + "deepspeed: examples/deepspeed/ds_z3_config.json\n",
    "galore": LOADS["full"].replace("steps: 8", "steps: 1") + "use_galore: true\n"
    "galore_layerwise: true\ngalore_target: all\ngalore_rank: 128\ngalore_scale: 2.0\n",
    "apollo": LOADS["full"].replace("steps: 8", "steps: 1") + "use_apollo: true\n"
    "apollo_layerwise: true\napollo_rank: 256\napollo_scale: 1.0\napollo_scale_type: tensor\n",
    "badam": LOADS["full"] + "use_badam: true\nbadam_mode: layer\nbadam_verbose: 2\n"
    "badam_switch_mode: ascending\nbadam_switch_interval: 50\n",
    "adam mini": LOADS["full"] + "use_adam_mini: true\n",
    "muon": LOADS["full"] + "use_muon: true\n",
    "oft": COMMON.replace("lora\nlora_rank: 8\nlora_target: all", "oft\noft_block_size: 32"),
    "llama pro": COMMON.replace("lora\nlora_rank: 8\nlora_target: all", "freeze")
    + "freeze_trainable_layers: 8\nuse_llama_pro: true\n",
    "quantized export": "model_name_or_path: org/Some-4B\ntemplate: llama3\nexport_dir: saves/q\n"
    "export_quantization_bit: 4\nexport_quantization_dataset: data/c4_demo.jsonl\n",
    "vision": COMMON + "image_max_pixels: 262144\nvideo_max_pixels: 16384\n"
    "freeze_vision_tower: true\nfreeze_multi_modal_projector: true\n",
    "benchmark": "model_name_or_path: org/Some-4B\ntask: mmlu_test\nlang: en\nn_shot: 5\n"
    "save_dir: saves/eval\nbatch_size: 4\ntemplate: fewshot\n",
}


@pytest.mark.parametrize("name", LOADS)
def test_run_files_that_load(name, tmp_path):
    (tmp_path / "run.yaml").write_text(LOADS[name])
    arguments = load(tmp_path / "run.yaml", environ={})
    assert arguments.ray_enabled is name.endswith("ray")


@pytest.mark.parametrize("name", FAILS)
def test_run_files_that_wait_for_a_capability(name, tmp_path):
    (tmp_path / "run.yaml").write_text(FAILS[name])
    with pytest.raises(ArgumentsError) as error:
        load(tmp_path / "run.yaml", environ={})
    sentences = {gap.sentence for gap in NOT_BUILT.values()}
    sentences |= {combination.sentence for combination in COMBINATIONS_NOT_BUILT}
    lines = str(error.value).splitlines()
    for line in lines[1:] or lines:
        assert any(line.endswith(sentence) for sentence in sentences), line
