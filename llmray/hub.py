"""A model's name or path to a local folder: folders, hub repositories, GGUF files converted once.

Imports nothing heavy until something is to be fetched or converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from contextlib import redirect_stderr
from io import StringIO
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmray import downloads, store
from llmray.arguments import environment
from llmray.arguments.model import ModelArguments
from llmray.arguments.rlhf import RlhfArguments
from llmray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = getLogger("llmray")

Kind = Literal["model", "adapter", "reference"]

CONFIGS: dict[Kind, str] = {
    "model": "config.json",
    "adapter": "adapter_config.json",
    "reference": "config.json",
}
KEYS: dict[Kind, str] = {
    "model": "model_name_or_path",
    "adapter": "adapter_name_or_path",
    "reference": "ref_model",
}
SAMPLE_BYTES = 1 << 16  # read at both ends and in the middle of a file to tell it from others
UNUSED = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "original/*")


def resolve(
    name: str | Path | None,
    model_args: ModelArguments,
    *,
    kind: Kind = "model",
    weights: bool = True,
) -> Path:
    """The local folder of a model or adapter, fetched or converted if need be.

    Args:
        name: a folder, a .gguf file, a folder that holds one .gguf file and no config.json, or
            the name of a hub repository.
        model_args: revision (of the model's repository; of others, such as those of adapters, the
            main branch is taken), cache folder and tokens of hubs; the folder of an adapter in its
            repository.
        kind: what it must hold.
        weights: whether weights are fetched from a hub too, or only the files around them.

    Raises:
        ModelError: if there is no such thing, or the hub cannot be reached.
    """
    if not name:
        raise ModelError("model_name_or_path is missing. A folder or a name on a hub is required.")
    path = Path(name).expanduser()
    if path.is_file():
        return _of_file(path, kind)
    if path.is_dir():
        return _of_folder(path / _inside(model_args, kind), kind)
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ModelError(
            f"{KEYS[kind]}={name}: there is no such folder. A folder with {CONFIGS[kind]} or a "
            "name on a hub is required: correct the path."
        )
    return _of_hub(str(name), model_args, kind, weights)


def resolve_all(model_args: ModelArguments, rlhf: RlhfArguments) -> Path:
    """The folder of a run's model, with its adapters and its reference fetched as well.

    Raises:
        ModelError: as `resolve`.
    """
    for name in (*model_args.adapter_name_or_path, *rlhf.ref_model_adapters):
        resolve(name, model_args, kind="adapter")
    if rlhf.ref_model is not None:
        resolve(rlhf.ref_model, model_args, kind="reference")
    return resolve(model_args.model_name_or_path, model_args)


def identity(model_dir: Path | str) -> str:
    """A digest that tells a model from others, wherever its folder lies.

    Of the configuration and of each weight file's size and samples; no whole file is read.
    """
    directory = Path(model_dir)
    config = json.loads((directory / "config.json").read_text())
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    weights = [p for p in directory.iterdir() if p.suffix in (".safetensors", ".bin")]
    for path in sorted(weights):
        digest.update(path.name.encode() + _sample(path))
    return digest.hexdigest()[:16]


def _of_file(path: Path, kind: Kind) -> Path:
    if path.suffix != ".gguf":
        raise ModelError(
            f"{KEYS[kind]}={path} is a file. A folder, a .gguf file or a name on a hub is "
            "required: name the folder that it lies in."
        )
    return _converted(path)


def _of_folder(path: Path, kind: Kind) -> Path:
    if (path / CONFIGS[kind]).is_file():
        return path
    ggufs = sorted(path.glob("*.gguf")) if kind != "adapter" else []
    if len(ggufs) == 1:
        return _converted(ggufs[0])
    if ggufs:
        raise ModelError(
            f"{path} holds {len(ggufs)} .gguf files. One is required: name it, such as {ggufs[0]}."
        )
    hint = ""
    if kind != "adapter" and (path / CONFIGS["adapter"]).is_file():
        key = "adapter_name_or_path" if kind == "model" else "ref_model_adapters"
        hint = f" It holds an adapter: that goes to {key}."
    raise ModelError(
        f"{KEYS[kind]}={path}: the folder has no {CONFIGS[kind]}.{hint} A folder in Hugging "
        "Face's format is required: complete it, or name another."
    )


def _of_hub(name: str, model_args: ModelArguments, kind: Kind, weights: bool) -> Path:
    is_the_model = kind != "adapter" and name == model_args.model_name_or_path
    revision = model_args.model_revision if kind == "model" or is_the_model else None
    words = (name, KEYS[kind], model_args, revision)
    unused = UNUSED if weights else (*UNUSED, "*.safetensors")
    path = downloads.fetch(*words, unused)
    is_pickled = weights and kind != "adapter" and not any(path.glob("*.safetensors"))
    if is_pickled and model_args.allow_pickled_weights:
        path = downloads.fetch(*words, UNUSED[1:])
    return _of_folder(path / _inside(model_args, kind), kind)


def _inside(model_args: ModelArguments, kind: Kind) -> str:
    """The folder within a repository, or within a folder here, that holds an adapter."""
    return (model_args.adapter_folder or "") if kind == "adapter" else ""


def _converted(gguf: Path) -> Path:
    """The folder in the cache with a GGUF file's model in safetensors, made at the first call."""
    key = hashlib.sha256(_sample(gguf) + str(gguf.stat().st_mtime_ns).encode()).hexdigest()[:16]
    root = environment.cache_directory(os.environ) / "models"
    target = root / f"{gguf.stem}-{key}"
    if store.is_committed(target):
        return target
    with downloads.locked(root / f"{target.name}.lock"):
        if not store.is_committed(target):  # else another process made it meanwhile
            store.sweep(root)
            log.info("converting %s once into %s (about a minute)", gguf, target)
            with store.staging(target) as directory:
                _convert(gguf, directory)
                store.share(directory)
                store.commit(directory, target, {"source": str(gguf)})
    return target


def _convert(gguf: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _check_tokens(gguf, tokenizer)
        with redirect_stderr(StringIO()):  # a progress bar that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
            )
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, struct.error) as error:
        if isinstance(error, ModelError | store.StoreError):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{gguf} cannot be converted: {first_line}. A whole GGUF file of an architecture that "
            "transformers reads is required; use the model's safetensors instead."
        ) from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _check_tokens(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make eos and pad those of the file's own metadata; transformers 5.6 read them wrong."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for name, key in (("eos", "eos_token_id"), ("pad", "padding_token_id")):
        field = fields.get(f"tokenizer.ggml.{key}")
        if field is None:
            continue
        expected = int(field.contents())
        if getattr(tokenizer, f"{name}_token_id") != expected:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(expected))
        found = getattr(tokenizer, f"{name}_token_id")
        if found != expected:
            raise ModelError(
                f"{gguf}: its metadata gives token {expected} as {key}, its tokenizer {found}. "
                "They must agree; use the model's safetensors instead."
            )


def _sample(path: Path) -> bytes:
    """A digest of a file's size, beginning, middle and end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()
