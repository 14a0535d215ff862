"""A run in this process, alone or as one of torchrun's ranks: `use_ray: false`.

Data is prepared before the process group exists, so no rank waits in a collective call for it. The
first SIGINT or SIGTERM asks for a stop at the next step border, a save, and exit code 130 or 143;
the third ends the process at once.
"""

from __future__ import annotations

import os
from logging import getLogger

from llmray import hub
from llmray.arguments import environment
from llmray.arguments.run import RunArguments
from llmray.data import access
from llmray.errors import ArgumentsError
from llmray.run import Context, RunResult, run
from llmray.stop_signals import EXIT_CODES, StopSignals
from llmray.train import checkpoint
from llmray.train.observers import Console
from llmray.train.parallel import World

log = getLogger("llmray")


def train(arguments: RunArguments) -> int:
    """Run the file here; returns the exit code: 0, or that of the signal that stopped it."""
    run_dir = arguments.training.output_dir
    if run_dir is None:
        raise ArgumentsError("output_dir is missing. A run needs a directory for its results.")
    with StopSignals() as signals:
        result = _train(arguments, run_dir, signals)
    if result.stopped is not None:
        log.info("stopped by %s after step %d, saved", result.stopped, result.steps)
        return EXIT_CODES[result.stopped]
    return 0


def _train(arguments: RunArguments, run_dir: str, signals: StopSignals) -> RunResult:
    model_dir = hub.resolve(arguments.model.model_name_or_path, arguments.model)
    ref = access.ready(arguments, model_dir, root=environment.prepared_directory(os.environ))
    world = World.from_environment(
        arguments.training.ddp_timeout, use_cpu=arguments.training.use_cpu
    )
    try:
        if world.is_main and arguments.training.do_train:
            options = arguments.training
            checkpoint.clear_way(
                run_dir, options.resume_from_checkpoint, overwrite=options.overwrite_output_dir
            )
        world.barrier()
        context = Context(
            world=world,
            run_dir=run_dir,
            prepared=ref,
            model_dir=model_dir,
            stop=signals.reason,
            observers=(Console.of(arguments.training),) if world.is_main else (),
        )
        return run(arguments, context)
    finally:
        world.close()
