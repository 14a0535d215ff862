"""Arguments of fine-tuning: the stage, which parameters train, with which loss."""

from __future__ import annotations

from typing import Literal

from llmray.arguments.group import Field, Float, Group, Int, Names, NamesOrFlag, Object

Stage = Literal["pt", "sft", "rm", "ppo", "dpo", "kto"]
FinetuningType = Literal["full", "freeze", "lora", "oft"]


class FreezeArguments(Group):
    """Training of some layers of the model."""

    freeze_trainable_layers: Int = Field(
        2, description="Layers that train: the last n, or for a negative number the first n."
    )
    freeze_trainable_modules: Names = Field(
        ("all",), description="Modules of those layers that train, or all."
    )
    freeze_extra_modules: Names = Field(
        (), description="Modules outside the layers that train as well, such as embed_tokens."
    )


class LoraArguments(Group):
    """Low-rank adapters."""

    additional_target: Names = Field(
        (), description="Modules that train whole beside the adapter and are saved with it."
    )
    lora_alpha: Int | None = Field(
        None, ge=1, description="The adapter's scale is this over its rank. Not given: twice rank."
    )
    lora_dropout: Float = Field(
        0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped in training."
    )
    lora_rank: Int = Field(8, ge=1, description="Rank of the adapter's two matrices.")
    lora_rank_pattern: Object | None = Field(
        None,
        description="Ranks of single modules, by name or regular expression: {q_proj: 16}.",
    )
    lora_alpha_pattern: Object | None = Field(
        None,
        description="Alphas of single modules, as lora_rank_pattern. Not given, nor lora_alpha: "
        "twice their rank.",
    )
    lora_target: Names = Field(
        ("all",),
        description="Modules that get an adapter: names, regular expressions for whole names, or "
        "all for every linear layer but the head. Experts' joint matrices are named like modules.",
    )
    loraplus_lr_ratio: Float | None = Field(
        None, gt=0, description="LoRA+: learning rate of B over that of A. Not given: no LoRA+."
    )
    loraplus_lr_embedding: Float = Field(
        1e-6, gt=0, description="LoRA+: learning rate of adapters of embeddings."
    )
    use_rslora: bool = Field(
        False, description="Scale by alpha over the root of the rank (rank-stabilised LoRA)."
    )
    use_dora: bool = Field(
        False, description="Train each weight's magnitude apart from its direction (DoRA)."
    )
    pissa_init: bool = Field(
        False, description="Start the adapter from the weight's principal components (PiSSA)."
    )
    pissa_iter: Int = Field(
        16,
        ge=-1,
        description="Iterations of PiSSA's approximate decomposition; -1 for the exact one.",
    )
    pissa_convert: bool = Field(
        False, description="Save a PiSSA adapter as an ordinary one for the original weights."
    )
    create_new_adapter: bool = Field(
        False, description="Merge all adapters that are loaded into the model, train a new one."
    )


class OftArguments(Group):
    """Orthogonal fine-tuning."""

    oft_rank: Int = Field(0, ge=0, description="Blocks of each layer; 0: from oft_block_size.")
    oft_block_size: Int = Field(32, ge=0, description="Size of a block; 0: from oft_rank.")
    oft_target: Names = Field(("all",), description="Modules that are rotated, or all.")
    module_dropout: Float = Field(
        0.0, ge=0, lt=1, description="Share of blocks set to the identity in training."
    )


class LossArguments(Group):
    """Losses of supervised fine-tuning beside cross-entropy."""

    use_dft_loss: bool = Field(
        False, description="Weigh each token's loss by its probability (DFT)."
    )
    use_asft_loss: bool = Field(
        False, description="DFT with a divergence from the reference added (ASFT)."
    )
    asft_alpha: Float = Field(0.1, ge=0, description="Weight of ASFT's divergence.")
    use_eaft_loss: bool = Field(False, description="Weigh each token's loss by its entropy (EAFT).")
    eaft_alpha: Float = Field(1.0, ge=0, description="Exponent of EAFT's weight.")


class MegatronArguments(Group):
    """Back ends beside torch's own."""

    use_mca: bool = Field(False, description="Train through Megatron Core's adapter.")
    use_hyper_parallel: bool = Field(False, description="Train through HyperParallel.")
    hyper_parallel_args: str | None = Field(None, description="Settings file of HyperParallel.")
    hyper_parallel_cp_size: Int = Field(
        1, ge=1, description="Devices that share one row in HyperParallel."
    )


class MethodArguments(Group):
    """The stage and the method."""

    stage: Stage = Field(
        "sft",
        description="What is trained: pt next tokens of texts, sft responses, rm a reward model, "
        "ppo by reward, dpo by pairs of responses, kto by responses marked good or bad.",
    )
    finetuning_type: FinetuningType = Field(
        "lora",
        description="What trains: all weights, some layers, a low-rank adapter, or rotations. "
        "qlora stands for lora with quantization_bit 4.",
    )
    pure_bf16: bool = Field(
        False, description="Weights, gradients and optimizer in bfloat16, without mixed precision."
    )
    use_llama_pro: bool = Field(
        False, description="Train only the blocks that were added to the model (LLaMA Pro)."
    )
    freeze_vision_tower: bool = Field(
        True, description="Multimodal models: do not train the vision tower."
    )
    freeze_multi_modal_projector: bool = Field(
        True, description="Multimodal models: do not train the projector."
    )
    freeze_language_model: bool = Field(
        False, description="Multimodal models: do not train the language model."
    )
    compute_accuracy: bool = Field(
        False, description="Report at evaluations the share of tokens predicted right."
    )
    disable_shuffling: bool = Field(
        False, description="Take the training rows in the order of the data."
    )
    plot_loss: NamesOrFlag = Field(
        False,
        description="Draw the loss, of evaluations too, as training_<key>.png into the output "
        "directory; names of other keys of trainer_log.jsonl are drawn besides.",
    )
    include_effective_tokens_per_second: bool = Field(
        False,
        description="Report tokens per second and worker, padding not counted, at the end.",
    )
    early_stopping_steps: Int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row without a better result.",
    )
    early_stopping_threshold: Float = Field(
        0.0, ge=0, description="A result that is better by no more than this does not count."
    )


class FinetuningArguments(
    MegatronArguments, LossArguments, OftArguments, FreezeArguments, LoraArguments, MethodArguments
):
    """Everything about fine-tuning that is not preference or reinforcement learning."""
