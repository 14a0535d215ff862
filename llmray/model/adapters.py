"""Low-rank adapters through peft: make a new one, load the last one to train on, merge others.

https://arxiv.org/abs/2106.09685, rank-stabilised: https://arxiv.org/abs/2312.03732, with magnitude
and direction apart (DoRA): https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmray import hub
from llmray.arguments.finetuning import FinetuningArguments
from llmray.arguments.model import ModelArguments
from llmray.arguments.problems import given
from llmray.arguments.run import RunArguments
from llmray.errors import ArgumentsError, ModelError
from llmray.model import adapter_files, embedding, pickled, pissa, targets
from llmray.model.layers import linear_modules
from llmray.model.load import load_config, load_ordinary
from llmray.model.quantize import is_low_bit, of_checkpoint, require_kind

if TYPE_CHECKING:
    from peft import PeftModel

log = getLogger("llmray")


def create(model: PreTrainedModel, arguments: RunArguments) -> PeftModel:
    """`model` with a new adapter that trains; it changes nothing yet.

    The adapter's random half depends on the run's seed alone.

    Raises:
        ArgumentsError: if lora_target, additional_target or a pattern name a module that is not
            there, or a matrix of experts is to get what it cannot.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    settings = arguments.finetuning
    require_kind(model, use_dora=settings.use_dora)
    found = targets.find(model, settings.lora_target)
    if found.parameters:
        _require_plain(settings, found.parameters)
    named = _whole_modules(model, settings.additional_target)
    whole = embedding.trains_whole(model, named, found.modules)
    ranks, alphas = _patterns(model, settings)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear_modules(model).values()),
        target_modules=found.modules,
        target_parameters=found.parameters or None,
        modules_to_save=list(whole) or None,
        ensure_weight_tying=_would_untie(model, whole),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_advice():
        torch.manual_seed(arguments.training.seed)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    # get_peft_model puts the folder here, which may lie in a cache
    tuned.peft_config["default"].base_model_name_or_path = arguments.model.model_name_or_path
    if settings.pissa_init:
        start = pissa.Start(
            settings.pissa_iter,
            arguments.training.seed,
            converts=settings.pissa_convert,
            ordinary=_ordinary(model, arguments.model),
        )
        pissa.attach(tuned, start)
    _quicken(tuned)
    return tuned


def resume(model: PreTrainedModel, name: str, arguments: RunArguments) -> PeftModel:
    """`model` with the adapter of a folder or hub name, which trains on.

    Raises:
        ModelError: if it is missing, damaged or made for another model.
        ArgumentsError: if pissa_init is set and the adapter did not start so.
    """
    tuned = _load(model, name, arguments.model, is_trainable=True)
    start = pissa.of(tuned)
    if start is not None:
        start.converts = arguments.finetuning.pissa_convert
    elif arguments.finetuning.pissa_init:
        raise ArgumentsError(
            f"pissa_init=true with adapter_name_or_path={name}, which is no adapter of PiSSA: it "
            "goes on as it is. Remove pissa_init, or write create_new_adapter: true."
        )
    config = tuned.peft_config["default"]
    log.info(
        "training on adapter %s: rank %s, alpha %s%s, as it was saved",
        name,
        config.r,
        config.lora_alpha,
        ", with DoRA" if config.use_dora else "",
    )
    _quicken(tuned)
    return tuned


def _quicken(tuned: PeftModel) -> None:
    from llmray.model import lora_linear  # peft takes a second to import

    lora_linear.use(tuned)


def merge(
    model: PreTrainedModel, names: Sequence[str], model_args: ModelArguments
) -> PreTrainedModel:
    """`model` with all the adapters added into its weights, in order; nothing trains.

    An adapter stays beside low-bit weights, which would take it in but roughly.

    Raises:
        ModelError: as `resume`.
    """
    if is_low_bit(model) and names:
        [name] = names  # more than one is refused with the arguments
        tuned = beside(model, name, model_args)
        log.info("adapter %s answers beside the low-bit weights", name)
        return cast("PreTrainedModel", tuned)
    for name in names:
        model = fold(beside(model, name, model_args))
        log.info("merged adapter %s", name)
    return model


def beside(model: PreTrainedModel, name: str, model_args: ModelArguments) -> PeftModel:
    """`model` with an adapter that answers beside its weights; nothing trains.

    Raises:
        ModelError: as `resume`.
    """
    return _load(model, name, model_args, is_trainable=False).requires_grad_(False).eval()


def fold(tuned: PeftModel) -> PreTrainedModel:
    """The model inside `tuned` with the adapter added into its weights; nothing trains."""
    _untie(tuned)
    merged: PreTrainedModel = tuned.merge_and_unload()
    return merged.requires_grad_(False)


def _load(
    model: PreTrainedModel, name: str, model_args: ModelArguments, *, is_trainable: bool
) -> PeftModel:
    from peft import LoraConfig, PeftModel

    directory = hub.resolve(name, model_args, kind="adapter")
    embedding.check(model, directory, name)
    pickled.require_safe(directory, model_args)
    try:
        config = LoraConfig.from_pretrained(directory)
        started, config.init_lora_weights = config.init_lora_weights, True
        adapter_files.check(model, directory, config)
        with _no_advice():
            # what is merged keeps its own float32 until it is rounded with the weight
            tuned = PeftModel.from_pretrained(
                model,
                directory,
                config=config,
                is_trainable=is_trainable,
                autocast_adapter_dtype=not is_trainable,
            )
    except SafetensorError as error:
        raise ModelError(
            f"the adapter file in {directory} is damaged ({error}). A whole "
            "adapter_model.safetensors is required: correct adapter_name_or_path."
        ) from error
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"the adapter in {directory} does not fit the model: {' '.join(lines[:2])}. An adapter "
            "of this very model is required: correct adapter_name_or_path or model_name_or_path."
        ) from error
    require_kind(model, use_dora=config.use_dora)
    _begin_as_saved(tuned, directory, started, _ordinary(model, model_args))
    return tuned


def _ordinary(
    model: PreTrainedModel, model_args: ModelArguments
) -> Callable[[], PreTrainedModel] | None:
    """Reads what low-bit weights were rounded from; None where nothing was, or the files are so."""
    directory = getattr(model, "llmray_directory", None)
    if directory is None or not is_low_bit(model):
        return None
    if of_checkpoint(load_config(directory, model_args)) is not None:
        return None
    return partial(load_ordinary, directory, model_args)


def _begin_as_saved(
    tuned: PeftModel,
    directory: Path,
    started: Any,
    ordinary: Callable[[], PreTrainedModel] | None,
) -> None:
    """Take from the base what an adapter of PiSSA started from."""
    if not str(started).startswith("pissa"):
        return
    kept = pissa.read(directory)
    if not kept:
        raise ModelError(
            f"the adapter in {directory} is one of PiSSA that lacks {pissa.FILE}: on the original "
            "weights it means nothing. A converted adapter is required (pissa_convert: true), or "
            "the file that a run of llmray writes beside it."
        )
    state = {name: p.detach().clone() for name, p in tuned.named_parameters() if ".lora_" in name}
    _, _, number = str(started).rpartition("_niter_")
    iterations = int(number) if number.isdecimal() else -1
    start = pissa.Start(iterations, 0, converts=False, ordinary=ordinary)
    pissa.attach(tuned, start)
    start.restore(tuned, kept)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in state:
                parameter.copy_(state[name])


def _require_plain(settings: FinetuningArguments, parameters: list[str]) -> None:
    """Experts' matrices take the plain form alone: their adapter is added to the weight itself."""
    asked = {
        "lora_dropout": settings.lora_dropout,
        "use_dora": settings.use_dora,
        "pissa_init": settings.pissa_init,
    }
    for key, value in asked.items():
        if value:
            raise ArgumentsError(
                f"{given(key, value)} with lora_target {parameters[0]}: joint matrices of experts "
                f"take neither dropout nor DoRA nor PiSSA. Remove {key}, or name linear modules "
                "alone."
            )


def _patterns(
    model: PreTrainedModel, settings: FinetuningArguments
) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks and alphas by name; where no alpha is given at all, it is twice each rank."""
    known = {name for name, _ in model.named_modules()} | set(targets.expert_parameters(model))
    ranks, alphas = settings.lora_rank_pattern or {}, settings.lora_alpha_pattern or {}
    targets.require_modules("lora_rank_pattern", ranks, known)
    targets.require_modules("lora_alpha_pattern", alphas, known)
    if settings.lora_alpha is None:
        alphas = {**{name: 2 * rank for name, rank in ranks.items()}, **alphas}
    return dict(ranks), dict(alphas)


def _whole_modules(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[str, ...]:
    known = {name for name, module in model.named_modules() if name and list(module.parameters())}
    targets.require_modules("additional_target", names, known)
    return names


def _would_untie(model: PreTrainedModel, whole: tuple[str, ...]) -> bool:
    """Whether a module that is to train whole shares its weight with the embedding or the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None or embedding.weight is not head.weight:
        return False
    return any(
        module in (embedding, head) and any(f".{full}".endswith(f".{name}") for name in whole)
        for full, module in model.named_modules()
    )


def _untie(tuned: PeftModel) -> None:
    """Give the head a matrix of its own where it, or the embedding, has an adapter of its own.

    Merged into one matrix, the adapter of one would change the other.
    """
    base = tuned.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    has_own = [hasattr(module, "base_layer") for module in (embedding, head)]
    if not any(has_own):
        return
    source = embedding.base_layer if has_own[0] else embedding
    layer = head.base_layer if has_own[1] else head
    if layer.weight is not source.weight:
        return
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False


@contextmanager
def _no_advice() -> Iterator[None]:
    """Inside, peft is silent on names that transformers renames, and on weights that are tied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # peft 0.21 looks for these among modules alone; ours are checked, and may name parameters
        said = "The following (rank|alpha)_pattern keys did not match"
        warnings.filterwarnings("ignore", said, RuntimeWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        yield
