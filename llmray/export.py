"""`llmray export`: one model out of a base and its adapters, in files that others read.

It is written to a fresh folder, loaded again and compared with the model that was trained; only
then does the folder get its name. `model.export` writes weights, `model_card` and `data.modelfile`
the texts beside them.
"""

from __future__ import annotations

import os
import shutil
import zlib
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmray import hub, model_card, store
from llmray.arguments.environment import other_hub
from llmray.arguments.model import ModelArguments
from llmray.arguments.run import RunArguments
from llmray.data import templates
from llmray.data.modelfile import as_modelfile
from llmray.data.tokenizer import load_tokenizer
from llmray.errors import ArgumentsError, ModelError, StoreError
from llmray.model import adapters, embedding, load, pickled, quantize
from llmray.model.export import write_weights
from llmray.train.generate import max_positions, stop_ids
from llmray.train.parallel import default_device

log = getLogger("llmray")

KIND = "export"  # what the manifest of an exported folder says it is
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
NUM_PROBED = 16  # tokens whose logits are compared
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# mean differences of logits that rounding of weights explains, by their deviation
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Seen:
    """A model as it was before it was written: its logits, and a sum of each of its tensors."""

    logits: Tensor  # (NUM_PROBED, V) float32, on the host
    sums: dict[str, int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Seen:
        """What is to be seen again."""
        return cls(probe(model), sums(model))


def export(arguments: RunArguments) -> str:
    """Write the run's model with its adapters merged; returns the place.

    Raises:
        LlmrayError: if something is missing, damaged or does not fit, the place is taken or full,
            or what was written is not what was trained. Nothing is left behind then.
    """
    target = _target(arguments)
    _require_result(arguments)
    model_args = _ordinary(arguments.model)
    model_dir = hub.resolve(model_args.model_name_or_path, model_args)
    folders = [
        hub.resolve(name, model_args, kind="adapter") for name in model_args.adapter_name_or_path
    ]
    _require_apart(target, [model_dir, *folders])
    device = default_device(0) if arguments.export.export_device == "auto" else torch.device("cpu")
    dtype = _dtype(model_args, load.load_config(model_dir, model_args))
    tokenizer = load_tokenizer(model_dir, model_args, arguments.data.template)
    base = load.load_model(
        model_dir,
        model_args,
        dtype=dtype,
        device=device,
        gradient_checkpointing=False,
        cutoff_len=arguments.data.cutoff_len,
    )
    if quantize.is_low_bit(base):
        raise ModelError(
            f"{model_dir} has its weights in low bits, into which adapters are merged but roughly. "
            "The model of ordinary weights is required: name it as model_name_or_path."
        )
    embedding.require_room(base, tokenizer)
    before = sums(base)
    merged = _merged(base, model_args)
    _fit_generation(merged, tokenizer, arguments)
    expected = Seen.of(merged)
    if not expected.logits.isfinite().all():
        raise ModelError(
            f"the model gives logits that are not finite in {_name(dtype)}. Set infer_dtype: "
            "bfloat16 or float32."
        )
    with store.staging(target) as directory:
        _write(merged, directory, tokenizer, arguments, folders[-1] if folders else model_dir)
        del base, merged
        again = _again(directory, model_args, dtype, device)
        _check(again, expected, before, has_adapters=bool(folders))
        del again
        store.commit(directory, target, {"kind": KIND})
    log.info("%s: %.2f GB in %s", target, store.size_bytes(target) / 1e9, _name(dtype))
    if arguments.export.export_hub_model_id is not None:
        upload(arguments, Path(target))
    return target


def upload(arguments: RunArguments, directory: Path) -> None:
    """Upload an exported folder to the repository of export_hub_model_id, which is made if needed.

    Raises:
        ModelError: if the hub refuses it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, token = arguments.export.export_hub_model_id, arguments.model.hf_hub_token
    assert name is not None, "an upload has a name"
    api = HfApi(token=token.get_secret_value() if token is not None else None)
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, ignore_patterns=[store.MANIFEST])
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{directory} is whole, but export_hub_model_id={name} could not be uploaded: "
            f"{first_line}. A repository that this user may write is required: log in (HF_TOKEN), "
            f"then `hf upload {name} {directory}`."
        ) from error
    log.info("uploaded to %s", name)


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Logits (NUM_PROBED, V) of a model at some tokens, in float32 on the host."""
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(NUM_PROBED, device=model.device)[None] * max(1, size // NUM_PROBED) % size
    logits: Tensor = model.eval()(ids, use_cache=False).logits
    return logits[0].float().cpu()


def sums(model: PreTrainedModel) -> dict[str, int]:
    """A checksum of each of the model's tensors, by name."""
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for name, tensor in model.state_dict().items()
    }


def _target(arguments: RunArguments) -> str:
    """The place to write to, if it is free or may be replaced."""
    target = arguments.export.export_dir
    if target is None:
        raise ArgumentsError("export_dir is not given. Write export_dir: with a folder.")
    is_uploaded, other = arguments.export.export_hub_model_id is not None, other_hub(os.environ)
    if is_uploaded and other is not None:
        raise ArgumentsError(
            f"export_hub_model_id with {other}: uploads go to Hugging Face's hub alone. Unset "
            f"{other}, or upload {target} by that hub's own tool."
        )
    if is_uploaded and store.is_uri(target):
        raise ArgumentsError(
            f"export_dir={target} with export_hub_model_id: an upload is made from a folder of "
            "this machine. Write such a folder as export_dir."
        )
    if not store.is_uri(target) and Path(target).is_file():
        raise ArgumentsError(f"export_dir={target} is a file. Name a folder.")
    if not store.list_names(target):
        return target
    if not arguments.training.overwrite_output_dir:
        raise ArgumentsError(
            f"export_dir={target} is not empty. Name a new folder, or write overwrite_output_dir: "
            "true to replace an earlier export there."
        )
    is_ours = store.is_committed(target) and store.read_manifest(target).metadata == {"kind": KIND}
    if not is_ours:
        raise ArgumentsError(
            f"export_dir={target} holds other things than an export, which are not replaced. Name "
            "another folder, or empty it."
        )
    return target


def _require_result(arguments: RunArguments) -> None:
    """Raise where a training file has a result, and the model that it began with is named."""
    output_dir, named = arguments.training.output_dir, arguments.model
    if output_dir is None or named.adapter_name_or_path or named.model_name_or_path == output_dir:
        return
    for key, config in hub.CONFIGS.items():
        if store.exists(store.join(output_dir, config)):
            raise ArgumentsError(
                f"the model that this file began with would be exported, while {output_dir} has "
                f"what it trained. Write {hub.KEYS[key]}: {output_dir}, or remove output_dir."
            )


def _require_apart(target: str, inputs: list[Path]) -> None:
    """Raise where a folder that is read lies in the one that is written, or holds it."""
    if store.is_uri(target):
        return
    place = Path(target).resolve()
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise ArgumentsError(
                f"export_dir={target} holds {path}, which is read. Name a folder of its own."
            )


def _ordinary(model_args: ModelArguments) -> ModelArguments:
    """The keys without those of quantisation: adapters are merged into ordinary weights."""
    if not model_args.is_quantized:
        return model_args
    log.info(
        "quantization_bit=%s was for training: the model is exported in ordinary weights",
        model_args.quantization_bit,
    )
    return model_args.model_copy(update={"quantization_bit": None})


def _dtype(model_args: ModelArguments, config: PretrainedConfig) -> torch.dtype:
    """What infer_dtype says; `auto` is what the base's files have."""
    if model_args.infer_dtype != "auto":
        return DTYPES[model_args.infer_dtype]
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return own if own in ROUNDING else torch.float32


def _merged(model: PreTrainedModel, model_args: ModelArguments) -> PreTrainedModel:
    """The model with all adapters merged, the last one compared with what it answers beside it."""
    names = model_args.adapter_name_or_path
    if not names:
        return model
    model = adapters.merge(model, names[:-1], model_args)
    dtype, bare = model.dtype, probe(model)
    tuned = adapters.beside(model, names[-1], model_args)
    trained = probe(tuned)
    merged = adapters.fold(tuned)
    log.info("merged adapter %s", names[-1])
    off, way = (probe(merged) - trained).abs().mean(), (bare - trained).abs().mean()
    if off > max(ROUNDING[dtype] * float(trained.std()), 0.5 * float(way)):
        raise ModelError(
            f"merging {names[-1]} gives other logits than the adapter beside the weights: they "
            f"differ by {off:.3g} in the mean, where the adapter changes {way:.3g}. Set "
            "infer_dtype: float32."
        )
    return merged


def _fit_generation(model: Any, tokenizer: Any, arguments: RunArguments) -> None:
    """Let generation by the exported files end where the run's responses end."""
    settings = model.generation_config
    settings.eos_token_id = list(stop_ids(model, tokenizer, arguments.data.template))
    settings.pad_token_id = tokenizer.pad_token_id
    drawn = (settings.temperature, settings.top_p, settings.top_k)
    if not settings.do_sample and any(value is not None for value in drawn):
        settings.do_sample = True  # else transformers refuses to write the three


def _write(
    model: PreTrainedModel, directory: Path, tokenizer: Any, arguments: RunArguments, trained: Path
) -> None:
    options, template = arguments.export, arguments.data.template
    write_weights(model, directory, tokenizer, shard_bytes=int(options.export_size * 1e9))
    if options.export_legacy_format:
        pickled.convert(directory)
    for name in VALUE_HEADS:
        if (trained / name).is_file():
            shutil.copyfile(trained / name, directory / name)
    found = templates.find(template) if template is not None else None
    stop = templates.stop_words(found, tokenizer.eos_token) if found else (tokenizer.eos_token,)
    system = arguments.data.default_system
    text = as_modelfile(
        found,
        stop=stop,
        eos=tokenizer.eos_token,
        system=found.default_system if system is None and found else system or "",
        context=max_positions(model),
    )
    (directory / "Modelfile").write_text(text, encoding="utf-8")
    card = model_card.card(arguments, trained)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _again(
    directory: Path, model_args: ModelArguments, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """What was written, loaded as anyone would; the tokenizer too."""
    plain = ModelArguments(
        model_name_or_path=str(directory),
        trust_remote_code=model_args.trust_remote_code,
        allow_pickled_weights=True,
    )
    load_tokenizer(directory, plain)
    return load.load_model(
        directory, plain, dtype=dtype, device=device, gradient_checkpointing=False
    )


def _check(
    again: PreTrainedModel, expected: Seen, before: dict[str, int], *, has_adapters: bool
) -> None:
    found = sums(again)
    differing = sorted(name for name, value in expected.sums.items() if found.get(name) != value)
    if differing:
        raise StoreError(
            f"{len(differing)} tensors were read back otherwise than they were written, first "
            f"{differing[0]}. Nothing was exported; the disk or its driver may be faulty: choose "
            "another export_dir."
        )
    if has_adapters and not any(found[name] != before.get(name) for name in found):
        raise ModelError(
            "the adapters change no weight: what would be exported is the base model. An adapter "
            "that was trained is required; where its changes are too small for 16 bits, set "
            "infer_dtype: float32."
        )
    off = (probe(again) - expected.logits).abs().max()
    if off > 1e-5 * expected.logits.abs().max():
        raise ModelError(
            f"the exported files give other logits than the model, by {off:.3g} at most. Nothing "
            "was exported. This was not expected: please report it with the model's name."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
