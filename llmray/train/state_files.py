"""Nested state as files without pickle: tensors in safetensors, the rest as JSON.

A state is built of dicts, lists, tuples, tensors, numbers, strings, booleans and None; what is read
back is equal to what was written, to the bit. Where the files lie, and whether they are whole, is
for `checkpoint` and `store`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_FILE_BYTES = 4 << 30  # a file's tensors are on the host at one time
TENSOR, ITEMS, TUPLE = "$tensor", "$items", "$tuple"


def write_state(directory: Path, name: str, state: Mapping[str, Any]) -> list[str]:
    """Write `state` as `<name>.json` and `<name>-<i>.safetensors` into a directory.

    Returns: the files' paths relative to the directory's parent.

    Raises:
        TypeError: names what in the state is neither a tensor nor a JSON value.
    """
    directory.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    body = _encode(dict(state), tensors, name)
    files = [f"{name}.json"]
    (directory / files[0]).write_text(json.dumps(body))
    for index, group in enumerate(_groups(tensors)):
        files.append(f"{name}-{index:03d}.safetensors")
        save_file(_separate(group), directory / files[-1])
    return [f"{directory.name}/{file}" for file in files]


def read_state(directory: Path, name: str, *path: str) -> dict[str, Any]:
    """The state that `write_state` wrote under `name`; empty where there is none.

    Args:
        directory: where it lies.
        name: of the state.
        path: keys that lead to a dict within it; then that is read, and no tensor beside it.
    """
    body_file = directory / f"{name}.json"
    if not body_file.is_file():
        return {}
    body = json.loads(body_file.read_text())
    for key in path:
        body = body[key]
    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in sorted(directory.glob(f"{name}-*.safetensors"))
        ]
        where = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = _decode(body, where)
    return state


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        key = f"{len(tensors)}:{where}"
        tensors[key] = value.detach()
        return {TENSOR: key}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        items = [(key, _encode(item, tensors, f"{where}/{key}")) for key, item in value.items()]
        return dict(items) if plain else {ITEMS: [[key, item] for key, item in items]}
    if isinstance(value, list | tuple):
        encoded = [_encode(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]
        return {TUPLE: encoded} if isinstance(value, tuple) else encoded
    raise TypeError(f"{where} is a {type(value).__name__}; a state holds tensors and JSON values")


def _decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        # cloned: what is read is mapped from the file, which rotation may remove
        return tensors[value[TENSOR]].get_tensor(value[TENSOR]).clone()
    if ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[ITEMS]}
    if TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[TUPLE])
    return {key: _decode(item, tensors) for key, item in value.items()}


def _groups(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = []
    size = MAX_FILE_BYTES
    for key, tensor in tensors.items():
        if not groups or size + tensor.nbytes > MAX_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    return groups


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host, contiguous, no two of them sharing memory."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        host = tensor.to("cpu", memory_format=torch.contiguous_format).contiguous()
        pointer = host.untyped_storage().data_ptr()
        whole = host.untyped_storage().nbytes() == host.nbytes
        separate[key] = host if whole and pointer not in seen else host.clone()
        seen.add(pointer)
    return separate
