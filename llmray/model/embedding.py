"""The rows of embedding and head that added tokens need: how many, and how each begins.

A row depends on the model's weights, its token and the run's keys alone: it is the same on every
rank, after a resume, and whenever the same run file loads the model again. An adapter's folder
holds the vocabulary that it was trained with in `vocabulary.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmray import store, vocabulary
from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError
from llmray.model.quiet import quiet
from llmray.vocabulary import Extended

log = getLogger("llmray")

MULTIPLE = 64  # rows are filled up to a multiple of it, which matrix products take best
FILE = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary that weights belong to.

    `rows` are those of the embedding, `added` the ids of the tokens that the run added to the
    base's own, `special` those of them that are special.
    """

    rows: int
    added: Mapping[str, int] = field(default_factory=dict)
    special: tuple[str, ...] = ()


def fit(model: PreTrainedModel, model_dir: Path, model_args: ModelArguments) -> None:
    """Give embedding and head of a freshly loaded model rows for all tokens of the run.

    Does nothing where no key adds a token and resize_vocab is false.

    Raises:
        ModelError: the model's embedding or head cannot be enlarged.
        ArgumentsError: the keys of added tokens are wrong.
    """
    asked = vocabulary.additions(model_args)
    if not asked.tokens and not model_args.resize_vocab:
        return
    extended = vocabulary.load(model_dir, model_args)
    rows = num_rows(model)
    _say(extended, rows, model_args)
    if extended.num_ids > rows:
        _enlarge(model, extended.num_ids)
    begun = _begun(extended, rows)
    known = min(rows, extended.num_known)
    descriptions = {
        token: _known_ids(extended, text, known) for token, text in asked.descriptions.items()
    }
    if model_args.init_special_tokens == "noise_init":
        descriptions = {}
    is_noisy = model_args.init_special_tokens != "desc_init"
    for salt, matrix in _matrices(model).items():
        matrix[rows:] = matrix[:known].mean(0, dtype=torch.float32).to(matrix.dtype)
        for token, index in begun.items():
            ids = descriptions.get(token)
            matrix[index] = _row(matrix[:known], ids, token, salt, is_noisy=is_noisy or not ids)
    special = tuple(token for token in asked.special if token in extended.added)
    model.llmray_vocabulary = Vocabulary(num_rows(model), extended.added, special)


def num_rows(model: PreTrainedModel) -> int:
    """How many rows the embedding of a model has."""
    return int(model.get_input_embeddings().weight.shape[0])


def of(model: Any) -> Vocabulary:
    """The vocabulary of a model: as `fit` left it, else its own."""
    if hasattr(model, "llmray_vocabulary"):
        found: Vocabulary = model.llmray_vocabulary
        return found
    return Vocabulary(num_rows(model))


def require_room(model: PreTrainedModel, tokenizer: Any) -> None:
    """Fail if a tokenizer has ids that the embedding has no row for.

    Raises:
        ModelError: it has.
    """
    largest, rows = max(tokenizer.get_vocab().values()), num_rows(model)
    if largest >= rows:
        raise ModelError(
            f"The tokenizer of {model.name_or_path} has ids up to {largest}, its embedding "
            f"{rows} rows. A row for each token is required: write resize_vocab: true, or mend the "
            "tokenizer."
        )


def trains_whole(
    model: PreTrainedModel, named: tuple[str, ...], adapted: Iterable[str]
) -> tuple[str, ...]:
    """The modules that train whole beside an adapter: those `named`, else what holds added tokens.

    Those are the embedding, and the head where its weights are its own. One that is `adapted`
    trains by its adapter.
    """
    if not of(model).added:
        return named
    idle = [
        name
        for name, module in _tables(model).items()
        if not _is_among(model, module, (*named, *adapted))
    ]
    if named and idle:
        log.warning(
            "additional_target=%s leaves out %s: the rows of added tokens stay there as they "
            "begin. Add it to train them.",
            ",".join(named),
            ", ".join(idle),
        )
    if named or not idle:
        return named
    log.info("tokens are added: %s train(s) whole beside the adapter", ", ".join(idle))
    return tuple(idle)


def _tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with a row for each id, by name: the embedding, and a head of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(embedding)]: embedding}
    if head is not None and head.weight is not embedding.weight:
        found[names[id(head)]] = head
    return found


def _is_among(model: PreTrainedModel, table: nn.Module, named: Iterable[str]) -> bool:
    """Whether names, whole or last parts, reach a module or one that shares its weight."""
    ends = tuple(f".{name}" for name in named)
    return any(
        f".{name}".endswith(ends)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is table.weight
    )


def warn_if_frozen(model: PreTrainedModel) -> None:
    """Say it where tokens were added and nothing of their embedding trains."""
    found = of(model)
    if found.added and not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        log.warning(
            "%d tokens are added, and the embedding does not train: their rows stay as they "
            "begin. With finetuning_type: freeze name it in freeze_extra_modules; with lora, begin "
            "a new adapter.",
            len(found.added),
        )


# --- what an adapter needs -----------------------------------------------------------------------


def write(model: Any, directory: Path) -> None:
    """Write the vocabulary of `model` beside its adapter."""
    store.write_atomic(directory / FILE, json.dumps(asdict(of(model)), indent=2) + "\n")


def is_saved_along(tuned: Any) -> bool:
    """Whether an adapter's file needs the embedding although it does not train: rows are new."""
    base = tuned.get_base_model()
    embedding = base.get_input_embeddings()
    return bool(of(base).added) and not hasattr(embedding, "modules_to_save")


def check(model: PreTrainedModel, adapter_dir: Path, name: str) -> None:
    """Compare the vocabulary that an adapter was trained with with the model's.

    Args:
        model: the model that the adapter is for.
        adapter_dir: its folder; one without `vocabulary.json` is judged by its tensors alone.
        name: of the adapter, for messages.

    Raises:
        ModelError: they do not fit.
    """
    ours, theirs = of(model), _read(adapter_dir / FILE)
    if theirs is not None:
        missing = {t: i for t, i in theirs.added.items() if ours.added.get(t) != i}
        if missing and not _knows(model, missing):
            keys = _as_keys(theirs)
            raise ModelError(
                f"adapter {name} was trained with {len(theirs.added)} added tokens and "
                f"{theirs.rows} rows of the embedding; here {', '.join(sorted(missing)[:5])} "
                f"{'have' if len(missing) > 1 else 'has'} no such id, and there are {ours.rows} "
                f"rows. The same vocabulary is required: write {keys}, first and "
                "in that order."
            )
    rows = _rows_in(adapter_dir, model)
    if rows is None and theirs is not None and theirs.rows > ours.rows:
        rows = theirs.rows
    if rows is not None and rows != ours.rows:
        raise ModelError(
            f"adapter {name} belongs to an embedding of {rows} rows, and the model has "
            f"{ours.rows}. The same vocabulary is required: name the base that the adapter was "
            "trained on, and add the tokens that its run added (add_tokens, add_special_tokens)."
        )


def _read(path: Path) -> Vocabulary | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return Vocabulary(int(found["rows"]), dict(found["added"]), tuple(found["special"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is damaged ({error!r}). What llmray wrote beside the adapter is required: "
            "copy its folder again."
        ) from error


def _knows(model: PreTrainedModel, tokens: Mapping[str, int]) -> bool:
    """Whether the model's own tokenizer has these ids, as of a base that was enlarged before."""
    directory = getattr(model, "llmray_directory", None)
    if directory is None or not any(Path(directory).glob("tokenizer*")):
        return False
    own = vocabulary.load(directory, ModelArguments()).tokenizer.get_vocab()
    return all(own.get(token) == index for token, index in tokens.items())


def _as_keys(needed: Vocabulary) -> str:
    ordered = sorted(needed.added, key=lambda token: needed.added[token])
    by_key = {
        "add_tokens": [token for token in ordered if token not in needed.special],
        "add_special_tokens": [token for token in ordered if token in needed.special],
    }
    return " and ".join(f"{key}: {','.join(found)}" for key, found in by_key.items() if found)


def _rows_in(adapter_dir: Path, model: PreTrainedModel) -> int | None:
    """The rows of an embedding or head that an adapter's file holds whole."""
    path = adapter_dir / "adapter_model.safetensors"
    if not path.is_file():
        return None
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = tuple(f".{n}.weight" for n, module in model.named_modules() if module in tables)
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                if name.replace(".base_layer.", ".").endswith(names):
                    return int(file.get_slice(name).get_shape()[0])
    except SafetensorError:
        return None  # loading says what is wrong with it
    return None


# --- how rows begin ------------------------------------------------------------------------------


def _say(extended: Extended, rows: int, model_args: ModelArguments) -> None:
    if extended.added:
        log.info(
            "%d tokens added, ids %d to %d; their rows begin by init_special_tokens: %s",
            len(extended.added),
            min(extended.added.values()),
            max(extended.added.values()),
            model_args.init_special_tokens,
        )
    elif model_args.add_tokens or model_args.add_special_tokens:
        log.info("all tokens that are to be added are in the tokenizer already")
    if extended.num_ids <= rows:
        log.info("the embedding has %d rows for %d ids: it stays", rows, extended.num_ids)
    elif not model_args.resize_vocab:
        log.info("tokens are added: resize_vocab is true")


def _begun(extended: Extended, rows: int) -> dict[str, int]:
    """The tokens whose rows begin here, with their ids: added ones, and those without a row."""
    beyond = {t: i for t, i in extended.tokenizer.get_vocab().items() if i >= rows}
    return {**beyond, **extended.added}


def _enlarge(model: PreTrainedModel, num_ids: int) -> None:
    head = model.get_output_embeddings()
    if not _is_resizable(model, head):
        raise ModelError(
            f"{type(model).__name__} has an embedding or a head that cannot be enlarged: plain "
            "weights are required. Remove resize_vocab and the keys that add tokens; quantized "
            "weights are enlarged before they are quantized."
        )
    old = num_rows(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), quiet():
        model.resize_token_embeddings(num_ids, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    new = num_rows(model)
    head = model.get_output_embeddings()
    if head is not None and head.weight.shape[0] != new:
        raise ModelError(
            f"{type(model).__name__} keeps a head of {head.weight.shape[0]} rows beside an "
            f"embedding of {new}. A model whose head grows along is required."
        )
    bias = getattr(head, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias[old:] = bias[:old].mean()
    log.info("embedding enlarged from %d to %d rows, a multiple of %d", old, new, MULTIPLE)


def _is_resizable(model: PreTrainedModel, head: Any) -> bool:
    weights = [model.get_input_embeddings().weight, *([head.weight] if head is not None else [])]
    return all(weight.dim() == 2 and weight.is_floating_point() for weight in weights)


def _matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices with a row for each id, as `_tables`."""
    found: list[Any] = list(_tables(model).values())
    salts = ("embedding", "head")
    return {salt: table.weight.detach() for salt, table in zip(salts, found, strict=False)}


def _known_ids(extended: Extended, text: str, known: int) -> list[int]:
    ids: Iterable[int] = extended.tokenizer.encode(text, add_special_tokens=False)
    return [index for index in ids if index < known]


def _row(known: Tensor, ids: list[int] | None, token: str, salt: str, *, is_noisy: bool) -> Tensor:
    """How the row of a token begins, (D,).

    Near the mean of all known rows, or of those of its description; noise has the deviation
    1 / sqrt(D), so about length 1.
    """
    rows = known if not ids else known[ids]
    row = rows.mean(0, dtype=torch.float32)
    if is_noisy:
        seed = hashlib.sha256(f"{salt} {token}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        noise = torch.randn(row.shape, generator=generator) / math.sqrt(len(row))
        row = row + noise.to(row.device)
    return row.to(known.dtype)
