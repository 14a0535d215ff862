"""Ranks on this machine for tests: processes that are forked from one that has imported it all.

Within `on_ranks(function, argument)` a function of a module runs on each of two ranks, in a process
of its own where `World.from_environment` finds the other.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# what a rank imports, imported once: the processes are forked from there
PRELOADED = ["llmray.run", "peft", "transformers.models.llama.modeling_llama"]


@contextmanager
def on_ranks(
    function: Callable[[Any], None], argument: Any, timeout_s: float = 280.0
) -> Iterator[None]:
    """Call `function` with `argument` on two ranks beside what is done inside; wait at its end.

    Fails where one of them fails or takes too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # it lives here, on a port that the system chooses: nobody can take it in between
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=timeout_s))
    ranks = [
        context.Process(target=_call, args=(function, argument, rank, store.port), daemon=True)
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + timeout_s
    try:
        yield
        while any(rank.exitcode is None for rank in ranks):
            assert not any(rank.exitcode for rank in ranks), "a rank has failed"
            assert time.monotonic() < end, f"the ranks took longer than {timeout_s} s"
            ranks[0].join(0.05)
            ranks[1].join(0.05)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _call(function: Callable[[Any], None], argument: Any, rank: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there, none is to be made
    }
    function(argument)
