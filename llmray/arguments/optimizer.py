"""Arguments of the optimizer and of the learning rate's schedule.

The families of `use_x` keys fold into one answer, `OptimizerArguments.choice`.
"""

from __future__ import annotations

from typing import Literal

from llmray.arguments.group import Field, Float, Group, Int, Names, Object, Share

Optim = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_anyprecision",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "adagrad",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "sgd",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "stable_adamw",
]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "step",
    "greedy",
]


class AdamArguments(Group):
    """The optimizer of most runs, and the schedule."""

    optim: Optim = Field("adamw_torch", description="The optimizer, by transformers' names.")
    optim_args: str | None = Field(
        None, description="Further settings of the optimizer, as name=value with commas."
    )
    optim_target_modules: Names = Field(
        (), description="Modules for galore_* and apollo_* values of optim."
    )
    learning_rate: Float = Field(5e-5, ge=0, description="Highest learning rate of the schedule.")
    weight_decay: Float = Field(
        0.0, ge=0, description="Decoupled weight decay; biases and norms are exempt."
    )
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="Decay of Adam's second moment.")
    adam_epsilon: Float = Field(
        1e-8, ge=0, description="Added to the root of Adam's second moment."
    )
    max_grad_norm: Float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )
    lr_scheduler_type: Schedule = Field(
        "linear", description="Course of the learning rate after its warm-up."
    )
    lr_scheduler_kwargs: Object | None = Field(
        None, description="Further settings of the schedule, as a mapping or a JSON object."
    )
    warmup_ratio: Float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps in which the learning rate rises from 0. Counts where "
        "warmup_steps is 0.",
    )
    warmup_steps: Share = Field(
        0,
        ge=0,
        description="Steps in which the learning rate rises from 0; below 1 a share of all steps.",
    )


class GaloreArguments(Group):
    """GaLore: the gradient in a low-rank space."""

    use_galore: bool = Field(False, description="Optimize in a low-rank space (GaLore).")
    galore_target: Names = Field(("all",), description="Linear modules that GaLore optimizes.")
    galore_rank: Int = Field(16, ge=1, description="Rank of GaLore's space.")
    galore_update_interval: Int = Field(
        200, ge=1, description="Steps between two choices of GaLore's space."
    )
    galore_scale: Float = Field(0.25, gt=0, description="Factor of GaLore's updates.")
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = Field(
        "std", description="Which side of the gradient GaLore projects."
    )
    galore_layerwise: bool = Field(
        False, description="Update each parameter in the backward pass, to hold one gradient."
    )


class ApolloArguments(Group):
    """APOLLO: the scale of Adam's update from a low-rank space."""

    use_apollo: bool = Field(
        False, description="Take Adam's scales from a low-rank space (APOLLO)."
    )
    apollo_target: Names = Field(("all",), description="Linear modules that APOLLO optimizes.")
    apollo_rank: Int = Field(16, ge=1, description="Rank of APOLLO's space.")
    apollo_update_interval: Int = Field(
        200, ge=1, description="Steps between two choices of APOLLO's space."
    )
    apollo_scale: Float = Field(32.0, gt=0, description="Factor of APOLLO's updates.")
    apollo_proj: Literal["svd", "random"] = Field(
        "random", description="How APOLLO's space is chosen."
    )
    apollo_proj_type: Literal["std", "right", "left"] = Field(
        "std", description="Which side of the gradient APOLLO projects."
    )
    apollo_scale_type: Literal["channel", "tensor"] = Field(
        "channel", description="One scale for each channel, or for the whole tensor."
    )
    apollo_layerwise: bool = Field(
        False, description="Update each parameter in the backward pass, to hold one gradient."
    )
    apollo_scale_front: bool = Field(
        False, description="Limit the growth of the update's norm before it is scaled."
    )


class BadamArguments(Group):
    """BAdam: Adam over one block of parameters at a time."""

    use_badam: bool = Field(False, description="Optimize block by block (BAdam).")
    badam_mode: Literal["layer", "ratio"] = Field(
        "layer", description="A block is a layer, or a share of each tensor."
    )
    badam_start_block: Int | None = Field(
        None, ge=0, description="First block. Not given: as badam_switch_mode says."
    )
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = Field(
        "ascending", description="Order of the blocks."
    )
    badam_switch_interval: Int = Field(
        50, ge=-1, description="Steps before the next block; -1 stays with the first."
    )
    badam_update_ratio: Float = Field(
        0.05, gt=1e-6, le=1, description="Share of each tensor that trains in mode ratio."
    )
    badam_mask_mode: Literal["adjacent", "scatter"] = Field(
        "adjacent", description="Whether that share lies together or is scattered."
    )
    badam_verbose: Literal[0, 1, 2] = Field(
        0, description="0 prints nothing, 1 the block, 2 the parameters that train."
    )


class OptimizerArguments(BadamArguments, ApolloArguments, GaloreArguments, AdamArguments):
    """Everything about the optimizer."""

    use_adam_mini: bool = Field(
        False, description="One second moment for each block of parameters (Adam-mini)."
    )
    use_muon: bool = Field(
        False, description="Orthogonalised momentum for matrices, AdamW for the rest (Muon)."
    )

    @property
    def families(self) -> tuple[str, ...]:
        """The optimizers asked for by `use_x` keys, at most one in a valid run."""
        asked = {
            "galore": self.use_galore,
            "apollo": self.use_apollo,
            "badam": self.use_badam,
            "adam_mini": self.use_adam_mini,
            "muon": self.use_muon,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def choice(self) -> str:
        """The optimizer of the run: galore, apollo, badam, adam_mini, muon, else `optim`."""
        return self.families[0] if self.families else self.optim
