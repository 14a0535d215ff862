"""Training on Ray: the driver's side, from the cluster to the files in output_dir.

Connects, compares needs with what is there, prepares the data, lets Ray Train start and restart
workers, shows their progress, turns signals into a stop, and leaves the final files in output_dir.
What a worker does is in `worker`; nothing here trains.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from logging import getLogger
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from llmray import store
from llmray.arguments import environment, reward_sets
from llmray.data.prepared import PreparedRef
from llmray.errors import ArgumentsError, ClusterError, LlmrayError
from llmray.orchestration import actors, cluster, prepare_job, worker
from llmray.orchestration import board as boards
from llmray.orchestration.failures import FailureRule, describe
from llmray.orchestration.meeting import MeetingConfig
from llmray.orchestration.plan import Node, Placement, capacity, place
from llmray.stop_signals import EXIT_CODES, StopSignals
from llmray.train import checkpoint
from llmray.train.observers import Console, Observer
from llmray.train.parallel import backend

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

log = getLogger("llmray")

COLLECT_EVERY_S = 0.5
ABANDON_S = 10.0
# Ray Train's own file in the run directory: it names checkpoints that rotation has removed since
SNAPSHOT = "checkpoint_manager_snapshot.json"
# how often the worker group may fail to start, each after a minute: an hour of waiting for nodes
MAX_START_FAILURES = 60
HEALTH_CHECK_ENV = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
HEALTH_CHECK_S = 0.5
PREEMPTION_ENV = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # one more process; nobody takes this node


def train(arguments: RunArguments, *, core: Callable[..., Any] | None = None) -> int:
    """Train on Ray; returns the exit code: 0, or that of the signal that stopped the run.

    Args:
        arguments: the run, its paths absolute.
        core: what each worker calls with (arguments, context) in place of `run.run`.

    Raises:
        LlmrayError: with one message for the user.
    """
    run_dir = run_directory(arguments)
    joined = cluster.connect(arguments.cluster)
    try:
        with DriverSignals() as signals:
            log.info("%s", joined)
            if joined.is_ours:
                os.environ.setdefault(PREEMPTION_ENV, "0")
            return _Driver(arguments, run_dir, signals, core, joined.is_ours).train()
    except Stopped as stop:
        log.info("stopped by %s", stop.reason)
        return EXIT_CODES[stop.reason]
    finally:
        ray.shutdown()


def prepare(arguments: RunArguments) -> PreparedRef | int:
    """Prepare the run's data on the cluster as `train` does, and nothing else.

    Returns: the data, or the exit code of the signal that stopped it.

    Raises:
        LlmrayError: with one message for the user.
    """
    joined = cluster.connect(arguments.cluster)
    try:
        with DriverSignals() as signals:
            log.info("%s", joined)
            nodes = list(cluster.inventory().nodes)
            here = ray.get_runtime_context().get_node_id()
            tasks_see = tasks_environment(joined.is_ours)
            with signals.interrupting():
                ref = prepare_job.prepare(arguments, nodes, here, tasks_see)
        assert isinstance(ref, PreparedRef), "streams are not prepared"
        return ref
    except Stopped as stop:
        log.info("stopped by %s; finished shards are kept", stop.reason)
        return EXIT_CODES[stop.reason]
    finally:
        ray.shutdown()


def tasks_environment(is_ours: bool) -> prepare_job.Environment:
    """What tasks get of this process's environment; in a cluster of its own they have it."""
    return prepare_job.Environment(
        *(({}, {}) if is_ours else cluster.split_environment(os.environ))
    )


def run_directory(arguments: RunArguments) -> str:
    """`<ray_storage_path>/<ray_run_name>`; the name not given is the last part of output_dir."""
    output_dir = arguments.training.output_dir
    name = arguments.cluster.ray_run_name
    if output_dir is None:
        raise ArgumentsError("output_dir is missing. A run needs a directory for its results.")
    storage = arguments.cluster.storage_path
    if "?" in storage:
        raise ArgumentsError(
            f"ray_storage_path={storage} has options after '?', which are not supported. Set them "
            "by environment variables (AWS_ENDPOINT_URL, AWS_REGION) and leave them out."
        )
    return store.join(storage, name or os.path.basename(output_dir.rstrip("/")))


class Stopped(BaseException):
    """A signal came while no worker trained: there is nothing to save."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DriverSignals(StopSignals):
    """SIGINT and SIGTERM of the driver, caught after ray.init, whose own handlers abort.

    While the data is prepared the first one interrupts at once; later it is a note that the driver
    reads: before a worker trains it ends the run, then it asks the workers to stop at a step
    border. The third ends everything at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._interrupts = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal raise `Stopped` inside the block; elsewhere that could break Ray's calls."""
        self._interrupts = True
        try:
            self.check()
            yield
        except SystemError:  # how some C code tells that it met an exception in a signal handler
            self.check()
            raise
        finally:
            self._interrupts = False

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.seen:
            raise Stopped(self.seen[0])

    def heard(self, name: str) -> None:
        """Warn at the second signal; interrupt where that is safe."""
        if len(self.seen) == 2:
            log.warning("%s again: a third one ends at once, without saving", name)
        if self._interrupts:
            raise Stopped(self.seen[0])


class _Trainer(TorchTrainer):
    # Ray Train's cleaner is a detached actor that a killed driver leaves behind where there is no
    # dashboard; workers and their placement group end with the driver's job without it. Its actor
    # for Ray Data would only take its share of a core: no Ray Data is used.

    def _create_default_callbacks(self) -> list[Any]:
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]


class TellsController(ControllerCallback):
    """Gives a board the handle of Ray Train's controller, which keeps it to itself."""

    def __init__(self, board: ActorHandle) -> None:
        self.board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train in the controller."""
        ray.get(self.board.keep_controller.remote(ray.get_runtime_context().current_actor))


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    arguments: RunArguments,
    run_dir: str,
    placement: Placement,
    env_vars: dict[str, str],
    *,
    max_failures: int,
    callbacks: list[Any],
) -> TorchTrainer:
    """Ray Train's trainer of a group of workers, not yet started.

    Args:
        loop: what each worker calls with `config`.
        config: see `loop`.
        arguments: say how workers meet, and for how long they wait for each other.
        run_dir: where Ray Train keeps its own file.
        placement: of the workers.
        env_vars: of the workers.
        max_failures: after which Ray Train starts the group anew.
        callbacks: of Ray Train.
    """
    import torch

    os.environ.setdefault(HEALTH_CHECK_ENV, str(HEALTH_CHECK_S))
    if placement.uses_gpu:
        env_vars = {**environment.allocator(os.environ), **env_vars}
    storage, _, name = run_dir.rpartition("/")
    level = "INFO" if environment.debug(os.environ) else "CRITICAL"
    kind = "cuda" if placement.uses_gpu and not _shares_a_gpu(placement) else "cpu"
    return _Trainer(
        loop,
        train_loop_config=config,
        torch_config=MeetingConfig(
            backend=backend(torch.device(kind)),
            timeout_s=int(arguments.training.ddp_timeout),
            master_addr=arguments.cluster.master_addr,
            master_port=arguments.cluster.master_port,
        ),
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=placement.uses_gpu,
            resources_per_worker=placement.resources,
            placement_strategy=placement.strategy,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=MAX_START_FAILURES
            ),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": env_vars},
            logging_config=LoggingConfig(level),
        ),
    )


@dataclass
class _Driver:
    arguments: RunArguments
    run_dir: str
    signals: DriverSignals
    core: Callable[..., Any] | None
    is_ours: bool  # the cluster was started by this process, whose environment it has
    rewards: actors.Actors = field(default_factory=actors.Actors)

    @cached_property
    def observer(self) -> Observer:
        """What shows the progress of rank 0 here."""
        return Console.of(self.arguments.training)

    def train(self) -> int:
        arguments, inventory = self.arguments, cluster.inventory()
        use_cpu, sets = arguments.training.use_cpu, reward_sets.of_runs([arguments])
        roles = actors.roles_of(sets)
        placement = place(arguments.cluster, inventory, use_cpu=use_cpu, roles=roles)
        for note in placement.notes:
            log.info("%s", note)
        nodes = [n for n in inventory.nodes if capacity(n, placement.resources)]
        nodes = nodes or list(inventory.nodes)
        here = ray.get_runtime_context().get_node_id()
        tasks_see = tasks_environment(self.is_ours)
        others = [node for node in nodes if node.node_id != here]
        check_nodes(arguments, self.run_dir, others, tasks_see.open_vars)
        actors.check([arguments], sets, placement, inventory, os.getcwd())
        with self.signals.interrupting():
            prepared = prepare_job.prepare(arguments, nodes, here, tasks_see)
        self._clear_run_dir()
        job = boards.Job(
            arguments=arguments,
            run_dir=self.run_dir,
            prepared=prepared,
            threads=placement.resources.get("CPU"),
            uses_gpu=placement.uses_gpu,
            holds=placement.resources,
            secrets=dict(tasks_see.secrets),
            core=self.core,
            folder=os.getcwd(),
            log_level=log.getEffectiveLevel(),
        )
        board_name = f"llmray-board-{uuid.uuid4().hex}"
        board = boards.create(board_name)
        with self.signals.interrupting():
            self.rewards = actors.start(sets, placement, inventory, board_name, tasks_see)
        with closing(self.rewards):
            ray.get(board.give.remote(replace(job, seats=self.rewards.seats_of(arguments))))
            self._fit(self._trainer(placement, board, dict(tasks_see.open_vars)), board)
        output_dir = str(arguments.training.output_dir)
        if leave_files(self.run_dir, output_dir):
            log.info("results are in %s, checkpoints in %s", output_dir, self.run_dir)
        stopped: str | None = ray.get(board.outcome.remote())
        if stopped is not None:
            log.info("stopped by %s, saved in %s", stopped, self.run_dir)
            return EXIT_CODES[stopped]
        return 0

    def _clear_run_dir(self) -> None:
        training = self.arguments.training
        if not training.do_train:
            return  # what an earlier training left there stays
        requested = training.resume_from_checkpoint
        checkpoint.clear_way(self.run_dir, requested, overwrite=bool(training.overwrite_output_dir))
        store.remove_file(store.join(self.run_dir, SNAPSHOT))

    def _trainer(
        self,
        placement: Placement,
        board: ActorHandle,
        env_vars: dict[str, str],
    ) -> TorchTrainer:
        failures = self.arguments.cluster.ray_max_failures
        return make_trainer(
            worker.train_loop,
            {"board": board},
            self.arguments,
            self.run_dir,
            placement,
            env_vars,
            max_failures=failures,
            callbacks=[FailureRule(board, failures), TellsController(board)],
        )

    def _fit(self, trainer: TorchTrainer, board: ActorHandle) -> None:
        """Run `fit` in a second thread (its SIGINT handler is only for the main one)."""
        errors: list[BaseException] = []
        ended = threading.Event()

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # to be raised again in the main thread
                errors.append(error)
            finally:
                ended.set()

        threading.Thread(target=fit, name="llmray-fit", daemon=True).start()
        trains = asked = False
        while not ended.wait(COLLECT_EVERY_S):
            trains = self._show(board) or trains
            if self.signals.seen and not trains:
                if self._abandon(board, ended):
                    break
            elif self.signals.seen and not asked:
                asked = True
                log.info("%s: saving at the next step border, then ending", self.signals.seen[0])
                ray.get(board.request_stop.remote(self.signals.seen[0]))
        trains = self._show(board) or trains
        if not trains:
            self.signals.check()
        if errors:
            raise self._told(errors[0], board)

    def _abandon(self, board: ActorHandle, ended: threading.Event) -> bool:
        """End Ray Train before a worker trains; False while its controller is still to start.

        The thread that waits for it must end before this process leaves Ray, which crashes under
        a call that is not over.
        """
        controller = ray.get(board.controller.remote())
        if controller is None:
            return False
        ray.kill(controller)
        return ended.wait(ABANDON_S)

    def _show(self, board: ActorHandle) -> bool:
        """Show what rank 0 told; returns whether it began to train."""
        messages = ray.get(board.collect.remote())
        for message in messages:
            if message.kind == "hung":
                self.rewards.kill_hung(*message.content)
            else:
                boards.replay(message, self.observer)
        return any(message.kind == "start" for message in messages)

    def _told(self, error: BaseException, board: ActorHandle) -> BaseException:
        """The error to raise for what ended `fit`."""
        for _, failure in ray.get(board.failures.remote()):
            return failure
        if isinstance(error, ControllerError):
            error = error.controller_failure
        if isinstance(error, RayTaskError) and isinstance(error.cause, LlmrayError):
            return error.cause
        if isinstance(error, WorkerGroupError):
            what = describe(error.worker_failures)
            allowed = self.arguments.cluster.ray_max_failures
            told = ClusterError(
                f"{what}. The run failed more than ray_max_failures={allowed} times. Workers' logs "
                "are in /tmp/ray/session_latest/logs of their nodes. Mend the cause and run again "
                f"with resume_from_checkpoint: true; checkpoints are in {self.run_dir}."
            )
            told.__cause__ = error
            return told
        return error


def check_nodes(
    arguments: RunArguments, run_dir: str, nodes: list[Node], env_vars: Mapping[str, str]
) -> None:
    """Compare the other nodes with this process, before anything is loaded.

    Args:
        arguments: of the run.
        run_dir: its run directory.
        nodes: the other ones.
        env_vars: of the tasks there, as those that prepare have them: they share a process.

    Raises:
        ClusterError: their versions differ, or they do not see what the run names.
    """
    cluster.check_versions(nodes, env_vars)
    cluster.check_visible(nodes, store.parent(run_dir), "ray_storage_path", env_vars)
    for key in ("model_name_or_path", "adapter_name_or_path", "new_special_tokens_config"):
        value = getattr(arguments.model, key)
        for path in [value] if isinstance(value, str) else value or []:
            cluster.check_exists(nodes, path, key, env_vars)


def leave_files(run_dir: str, output_dir: str) -> bool:
    """Copy the final files, checkpoints excepted, to output_dir; whether that is another place."""
    if os.path.abspath(output_dir) == run_dir:
        return False
    names = [name for name in store.list_files(run_dir) if _is_final(name)]
    store.fetch(run_dir, names, output_dir)
    return True


def _shares_a_gpu(placement: Placement) -> bool:
    """Whether ranks may meet on one GPU, which NCCL refuses; gloo reduces there too."""
    return placement.num_workers > 1 and placement.resources["GPU"] < 1


def _is_final(name: str) -> bool:
    return not name.startswith((".", "checkpoint"))
