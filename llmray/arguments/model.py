"""Arguments of the model: what is loaded, how it is computed, which low-bit format it has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, SecretStr

from llmray.arguments.group import (
    Field,
    Float,
    Group,
    Int,
    Names,
    Object,
    TextOrObject,
    as_number,
)

Bits = Annotated[Literal[1, 2, 3, 4, 5, 6, 8], BeforeValidator(as_number)]


class BaseArguments(Group):
    """The model itself, its adapters, its tokenizer and how it is computed."""

    model_name_or_path: str | None = Field(
        None,
        description="The model: a local folder, a local .gguf file, or a name on a model hub. "
        "Required.",
    )
    adapter_name_or_path: Names = Field(
        (),
        description="Adapters to load on top of the model, in order. All but the last are merged "
        "into it; training continues the last one.",
    )
    adapter_folder: str | None = Field(
        None,
        description="Folder inside each of adapter_name_or_path, on a hub or here, that holds its "
        "weights.",
    )
    cache_dir: str | None = Field(
        None, description="Folder for what is downloaded from a hub. Not given: the hub's own."
    )
    use_fast_tokenizer: bool = Field(
        True,
        description="Use the tokenizer written in Rust. Transformers 5 has no other kind for "
        "models that have one.",
    )
    resize_vocab: bool = Field(
        False,
        description="Enlarge the embedding and the output layer to hold all tokens, rounded up to "
        "a multiple of 64. Follows from added tokens.",
    )
    split_special_tokens: bool = Field(
        False,
        description="Tokenize special tokens that stand in the data, or in a message of a chat, as "
        "plain text; those that the template writes stay special.",
    )
    add_tokens: Names = Field((), description="Ordinary tokens to add to the tokenizer.")
    add_special_tokens: Names = Field(
        (), description="Special tokens to add to the tokenizer. Also known as new_special_tokens."
    )
    new_special_tokens_config: str | None = Field(
        None,
        description="YAML file of special tokens and a text that describes each, from which its "
        "embedding starts.",
    )
    init_special_tokens: Literal["noise_init", "desc_init", "desc_init_w_noise"] = Field(
        "noise_init",
        description="Where the embedding of an added token starts: near the mean of all, at the "
        "mean of its description's tokens, or near that; without a description near the mean.",
    )
    model_revision: str = Field(
        "main", description="Branch, tag or commit of the model's hub repository."
    )
    low_cpu_mem_usage: bool = Field(
        True,
        description="Load weights without a second copy in memory. Transformers 5 always does.",
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = Field(
        None,
        description="How rotary positions are stretched where cutoff_len exceeds the length that "
        "the model was trained for. The factor is cutoff_len over that length, rounded up.",
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3", "flex"] = Field(
        "auto",
        description="Attention kernel: the best one that is there, plain matrix products on padded "
        "rows, torch's own, FlashAttention 2 or 3, or torch's flex attention.",
    )
    shift_attn: bool = Field(
        False, description="Shifted sparse attention of LongLoRA, for training on long rows."
    )
    mixture_of_depths: Literal["convert", "load"] | None = Field(
        None,
        description="Turn the model into a mixture of depths, or load one that was so turned.",
    )
    use_unsloth: bool = Field(False, description="Train the adapter through unsloth's kernels.")
    use_unsloth_gc: bool = Field(
        False,
        description="Recompute activations, and keep the inputs of the layers in the memory of "
        "the CPU until then.",
    )
    enable_liger_kernel: bool = Field(
        False,
        description="Replace layers by Liger's fused kernels; on GPUs. Also known as "
        "use_liger_kernel.",
    )
    liger_kernel_config: Object | None = Field(
        None,
        description="Which of Liger's kernels are used, such as {rope: false}. Not given: all that "
        "the model's type has.",
    )
    moe_aux_loss_coef: Float | None = Field(
        None,
        ge=0,
        description="Weight of the loss that spreads tokens over a mixture's experts; 0 leaves it "
        "out. Not given: as the model's configuration says.",
    )
    disable_gradient_checkpointing: bool | None = Field(
        None,
        description="True keeps all activations: faster, more memory. False recomputes them in "
        "the backward pass. Not given: recomputed only where memory asks for it.",
    )
    use_reentrant_gc: bool | None = Field(
        None,
        description="Which of torch's two implementations recomputes activations. Not given: the "
        "one without re-entry, which torch recommends.",
    )
    upcast_layernorm: bool = Field(
        False,
        description="Keep the weights of normalisation layers in float32 and compute them in it.",
    )
    upcast_lmhead_output: bool = Field(
        False,
        description="Go on in float32 with what the output layer gives. The loss of a plain output "
        "layer always does.",
    )
    train_from_scratch: bool = Field(
        False,
        description="Take the architecture and the tokenizer from the model, but start from "
        "random weights.",
    )
    infer_backend: Literal["huggingface", "vllm", "sglang"] = Field(
        "huggingface", description="The engine that generates text for chat and prediction."
    )
    offload_folder: str = Field(
        "offload", description="Folder for weights that fit on no device during inference."
    )
    use_kv_cache: bool = Field(
        True,
        description="Keep keys and values between the tokens of a generation. Also known as "
        "use_cache.",
    )
    use_v1_kernels: bool = Field(
        False, description="Replace layers by kernels chosen for the device."
    )
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Number format of the weights for chat, prediction and export."
    )
    hf_hub_token: SecretStr | None = Field(
        None,
        description="Access token of the Hugging Face hub. Better kept in the environment as "
        "HF_TOKEN; never written to files or logs.",
    )
    ms_hub_token: SecretStr | None = Field(
        None,
        description="Access token of ModelScope, or MODELSCOPE_API_TOKEN in the environment.",
    )
    om_hub_token: SecretStr | None = Field(
        None, description="Access token of Modelers, or OM_HUB_TOKEN in the environment."
    )
    print_param_status: bool = Field(
        False,
        description="Print name, shape, number format, device and trainability of each parameter.",
    )
    allow_pickled_weights: bool = Field(
        False,
        description="Read weights of .bin files, tensors alone, where a model or adapter has no "
        "safetensors.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with a model from a hub."
    )
    compute_dtype: Literal["float16", "bfloat16", "float32"] | None = Field(
        None,
        description="Number format of the arithmetic. Follows from bf16, fp16, fp32 and pure_bf16; "
        "decides where none of them is given.",
    )
    device_map: TextOrObject | None = Field(
        None,
        description="Device of the model. Follows from what each process has, and must name that: "
        '{"": "cuda:0"} or cpu.',
    )
    model_max_length: Int | None = Field(
        None, ge=1, description="Follows from cutoff_len, and must equal it."
    )
    block_diag_attn: bool = Field(
        False,
        description="Texts of one row do not see each other. Follows from packing: it always holds "
        "but in the blocks of stage pt, where true is refused.",
    )


class QuantizationArguments(Group):
    """Low-bit weights."""

    quantization_method: Literal["bnb", "hqq", "eetq"] = Field(
        "bnb",
        description="Library of low-bit weights: bitsandbytes (bnb or bitsandbytes), HQQ or EETQ.",
    )
    quantization_bit: Bits | None = Field(
        None,
        description="Bits per weight when weights are quantized at loading: bnb 4 or 8, hqq 1 to "
        "8, eetq 8. Not given: not quantized.",
    )
    quantization_type: Literal["fp4", "nf4"] = Field(
        "nf4", description="Number format of bitsandbytes' 4-bit weights."
    )
    double_quantization: bool = Field(
        True, description="Quantize the scales of 4-bit weights as well."
    )
    quantization_device_map: Literal["auto"] | None = Field(
        None, description="Spread a 4-bit model over all devices; for inference only."
    )
    fp8: bool = Field(False, description="Matrix products in 8-bit floating point.")
    fp8_backend: Literal["auto", "torchao", "te", "msamp"] = Field(
        "auto", description="Library of the 8-bit products."
    )
    fp8_enable_fsdp_float8_all_gather: bool = Field(
        False, description="Send sharded weights in 8-bit floating point."
    )


class ProcessorArguments(Group):
    """Images, video and audio before they reach a multimodal model."""

    image_max_pixels: Int = Field(
        768 * 768, ge=1, description="Larger images are shrunk to this many pixels."
    )
    image_min_pixels: Int = Field(
        32 * 32, ge=1, description="Smaller images are enlarged to this many pixels."
    )
    image_do_pan_and_scan: bool = Field(
        False, description="Add crops of wide or tall images (Gemma 3)."
    )
    crop_to_patches: bool = Field(False, description="Cut images into patches (InternVL).")
    video_max_pixels: Int = Field(
        256 * 256, ge=1, description="Larger video frames are shrunk to this many pixels."
    )
    video_min_pixels: Int = Field(
        16 * 16, ge=1, description="Smaller video frames are enlarged to this many pixels."
    )
    video_fps: Float = Field(2.0, gt=0, description="Frames taken from each second of a video.")
    video_maxlen: Int = Field(128, ge=1, description="At most this many frames of a video.")
    use_audio_in_video: bool = Field(False, description="Also use the sound of a video.")
    audio_sampling_rate: Int = Field(
        16000, ge=1, description="Sound is resampled to this many samples per second."
    )


class EngineArguments(Group):
    """Engines beside transformers' own: vLLM, SGLang, KTransformers."""

    vllm_maxlen: Int = Field(4096, ge=1, description="Tokens of prompt and response together.")
    vllm_gpu_util: Float = Field(
        0.9, gt=0, lt=1, description="Share of a GPU's memory that vLLM takes."
    )
    vllm_enforce_eager: bool = Field(False, description="Do without CUDA graphs in vLLM.")
    vllm_max_lora_rank: Int = Field(32, ge=1, description="Largest adapter rank that vLLM serves.")
    vllm_config: Object | None = Field(
        None, description="Further settings of the vLLM engine, as a mapping or a JSON object."
    )
    sglang_maxlen: Int = Field(4096, ge=1, description="Tokens of prompt and response together.")
    sglang_mem_fraction: Float = Field(
        0.7, gt=0, lt=1, description="Share of a GPU's memory that SGLang takes."
    )
    sglang_tp_size: Int = Field(
        -1, ge=-1, description="GPUs that share one model in SGLang; -1 takes all."
    )
    sglang_config: Object | None = Field(
        None, description="Further settings of the SGLang engine, as a mapping or a JSON object."
    )
    sglang_lora_backend: Literal["triton", "flashinfer"] = Field(
        "triton", description="Kernels of adapters in SGLang."
    )
    use_kt: bool = Field(
        False, description="Keep a mixture's experts on the CPU through KTransformers."
    )
    kt_optimize_rule: str | None = Field(
        None, description="KTransformers' file that says where each module runs."
    )
    cpu_infer: Int = Field(32, ge=1, description="CPU cores that KTransformers uses.")
    chunk_size: Int = Field(8192, ge=1, description="Tokens that KTransformers computes at once.")
    mode: Literal["normal", "long_context"] = Field(
        "normal", description="KTransformers' mode of training."
    )
    kt_maxlen: Int = Field(4096, ge=1, description="Tokens of prompt and response together.")
    kt_use_cuda_graph: bool = Field(True, description="Use CUDA graphs in KTransformers.")
    kt_mode: Literal["normal", "long_context"] = Field(
        "normal", description="KTransformers' mode of generation."
    )
    kt_force_think: bool = Field(
        False, description="Make KTransformers' responses begin with a thought."
    )


class ModelArguments(EngineArguments, ProcessorArguments, QuantizationArguments, BaseArguments):
    """Everything about the model."""

    @property
    def is_quantized(self) -> bool:
        """Whether weights are quantized at loading."""
        return self.quantization_bit is not None
