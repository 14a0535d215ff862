"""The content key of prepared data: a hash of everything that decides a token.

Digests of files are remembered by path, size, time of change and inode, so that a second run reads
none of them. Nothing that only decides how fast, or where, the data is prepared enters the key.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmray import store, vocabulary
from llmray.data import templates
from llmray.data.features import OF_STAGE
from llmray.data.sources import DataSet
from llmray.errors import DataError

if TYPE_CHECKING:
    from llmray.arguments.data import DataArguments
    from llmray.arguments.run import RunArguments

# Raise it with every change of llmray.data that changes what is prepared from the same inputs.
CODE_VERSION = 4
LIBRARIES = ("tokenizers", "transformers")
KEY_LENGTH = 32
SETTLED_S = 2.0  # a younger file may change again without its time of change showing it
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class Digests:
    """SHA-256 of files, remembered in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, path: str | Path) -> str:
        """The digest of a file's bytes; read only if the file is not as it was remembered.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            return self._of(Path(path).resolve())
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}. Required: a file that this "
                "user may read. Mend its name or its permissions."
            ) from error

    def _of(self, path: Path) -> str:
        seen = _state(path)
        note = self._folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:KEY_LENGTH]}.json"
        remembered = _read_note(note)
        if remembered is not None and remembered["file"] == seen:
            return str(remembered["digest"])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        is_settled = time.time() - seen["mtime_ns"] / 1e9 > SETTLED_S
        if is_settled and _state(path) == seen:
            store.write_atomic(note, json.dumps({"file": seen, "digest": digest}))
        return digest


def _state(path: Path) -> dict[str, Any]:
    found = os.stat(path)
    return {
        "path": str(path),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "inode": found.st_ino,
    }


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(note.read_text()))
    except (FileNotFoundError, ValueError):
        return None


def describe(
    arguments: RunArguments,
    model_dir: Path,
    train: Sequence[DataSet],
    evaluation: Sequence[DataSet],
    digests: Digests,
) -> dict[str, Any]:
    """All that decides a token of the prepared data, in JSON types, by name.

    Args:
        arguments: of the run.
        model_dir: the folder of the tokenizer.
        train, evaluation: the sets of the run.
        digests: of files.

    Raises:
        DataError: a file cannot be read, or there is no such template.
        ArgumentsError: the keys of added tokens are wrong.
    """
    data, stage = arguments.data, arguments.finetuning.stage
    seed = arguments.training.seed
    found: dict[str, Any] = {
        "code": CODE_VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "stage": OF_STAGE[stage],
        "cutoff_len": data.cutoff_len,
        "truncation": data.truncation,
        "bad_rows": data.bad_rows,
        "tokenizer": _tokenizer(model_dir, digests),
        "trust_remote_code": arguments.model.trust_remote_code,
        "template": None if data.template is None else asdict(templates.find(data.template)),
        "sets": [_set(dataset, digests, seed) for dataset in train],
        "eval_sets": [_set(dataset, digests, seed) for dataset in evaluation],
        "max_samples": data.max_samples,
        "val_size": data.val_size,
    }
    added = vocabulary.additions(arguments.model)
    if added.tokens:
        found["added_tokens"] = [list(added.ordinary), list(added.special)]
    if arguments.model.split_special_tokens:
        found["split_special_tokens"] = True
    if arguments.training.predict_with_generate:
        found["judges_responses"] = True
    if data.eval_on_each_dataset:
        found["evaluated_one_by_one"] = [dataset.name for dataset in evaluation]
    if len(data.dataset) > 1 and data.mix_strategy != "concat":
        found["mixing"] = [data.mix_strategy, *data.interleave_probs]
    if data.val_size or "mixing" in found:
        found["seed"] = seed
    return found | _of_rows(data, stage)


def _of_rows(data: DataArguments, stage: str) -> dict[str, Any]:
    """What decides how a text or a conversation becomes a row."""
    if stage == "pt":
        return {"packing": data.packs(stage)}
    found: dict[str, Any] = {
        "train_on_prompt": data.train_on_prompt,
        "mask_history": data.mask_history,
        "default_system": data.default_system,
        "tool_format": data.tool_format,
        "enable_thinking": data.enable_thinking,
        "preserve_thinking": data.preserve_thinking,
    }
    if data.packs(stage):
        found["packing"] = True
    return found


def key_of(description: Mapping[str, Any]) -> str:
    """The content key: a hash of a description, in hexadecimal digits."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _tokenizer(model_dir: Path, digests: Digests) -> dict[str, str]:
    names = [name for name in TOKENIZER_FILES if (model_dir / name).is_file()]
    more = sorted(path.name for path in model_dir.glob("*.tiktoken"))
    found = {name: digests.of(model_dir / name) for name in [*names, *more]}
    config = model_dir / "config.json"
    if config.is_file():  # the class of a tokenizer may follow from the model's type
        found["model_type"] = str(json.loads(config.read_text()).get("model_type"))
    return found


def _set(dataset: DataSet, digests: Digests, seed: int) -> dict[str, Any]:
    layout = dataset.layout
    return {
        "formatting": layout.formatting,
        "columns": dict(layout.columns),
        "tags": dict(layout.tags),
        "drawn": [dataset.num_samples, seed] if dataset.num_samples is not None else None,
        "files": [
            [file.format, file.identity or digests.of(file.origin or file.path)]
            for file in dataset.files
        ],
    }
