"""The random number generators of this rank: seeding them, and carrying them through a resume."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Choose deterministic kernels everywhere; an operation that has none raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class RandomState:
    """All generators of this rank; Resumable."""

    def state_dict(self) -> dict[str, Any]:
        """The generators' states: torch's as bytes, Python's and numpy's as plain values."""
        version, words, gauss = random.getstate()
        numpy_state = np.random.get_state(legacy=False)
        assert isinstance(numpy_state, dict)
        state = {
            "torch": torch.get_rng_state(),
            "python": {"version": version, "words": list(words), "gauss": gauss},
            "numpy": {
                "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
                "pos": int(numpy_state["state"]["pos"]),
                "has_gauss": int(numpy_state["has_gauss"]),
                "gauss": float(numpy_state["gauss"]),
            },
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the generators back where `state_dict` found them."""
        torch.set_rng_state(state["torch"].to(torch.uint8).cpu())
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        saved = state["numpy"]
        key = saved["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].to(torch.uint8).cpu())
