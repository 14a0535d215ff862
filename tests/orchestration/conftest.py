"""One Ray cluster a session, and runs of `llmray train` on it in processes of their own.

The cluster has three nodes on this machine with two cores each. It asks for a token, as one that
`ray.init` starts does; the token lies in a home directory of its own, so nothing of the machine's
is touched.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

OTHER_NODES = ("127.0.0.2", "127.0.0.3")
CORES_OF_A_NODE = 2
SESSION = "SESSION_OF_THE_HEAD"
# one process less in each group of workers; submitted jobs have it
WITHOUT_WATCHER = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory):
    """A home directory with a token, and an environment fit to start Ray from."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(os.urandom(32).hex())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        # the dashboard's agents would compile their modules at every start
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "USE_RAY"):
            patch.delenv(name, raising=False)
        patch.setenv("LLMRAY_CACHE", str(home / "cache"))
        yield home


@pytest.fixture(scope="session")
def ray_cluster(ray_home):
    """Address and session directory of the session's cluster, started in its own process."""
    with start_cluster([str(CORES_OF_A_NODE), *OTHER_NODES], RAY_AUTH_MODE="token") as words:
        yield words


@contextmanager
def start_cluster(words, cwd=None, **environ):
    """Address, session directory and dashboard of a cluster that ends with the block."""
    starter = Path(__file__).with_name("start_cluster.py")
    with subprocess.Popen(
        [sys.executable, str(starter), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environ},
        text=True,
        cwd=cwd,
    ) as process:
        found = process.stdout.readline().split()
        assert found, "the cluster did not start"
        yield found
        process.stdin.close()
        process.wait(timeout=300)


@pytest.fixture(scope="module")
def head(request, ray_home):
    """A cluster of one node with a dashboard, in the authentication mode `request.param`.

    What a process needs in its environment to send jobs there; SESSION is its session directory.
    """
    words = ["--dashboard", str(CORES_OF_A_NODE)]
    with start_cluster(words, RAY_AUTH_MODE=request.param) as found:
        head = {"RAY_AUTH_MODE": request.param, "RAY_API_SERVER_ADDRESS": f"http://{found[2]}"}
        head[SESSION] = found[1]
        _wait_for_jobs(head)
        yield head


def _wait_for_jobs(head, timeout=600.0):
    """Until the head takes jobs: its agent starts some seconds after it."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    words = [ray_command, "job", "submit", "--no-wait", "--", "true"]
    deadline = time.monotonic() + timeout
    while (
        done := subprocess.run(words, env={**os.environ, **head}, capture_output=True)
    ).returncode:
        assert b"No available agent" in done.stderr + done.stdout, done.stderr.decode()
        assert time.monotonic() < deadline, "the head takes no jobs"
        time.sleep(0.5)


@pytest.fixture(scope="session")
def ray_address(ray_cluster):
    """The address of the session's cluster."""
    return ray_cluster[0]


class Run:
    """A driver at work: its lines as they come, its workers, its files."""

    def __init__(self, words, environ, keys):
        self.keys = keys
        self.output_dir = Path(keys["output_dir"])
        self.run_dir = Path(keys["ray_storage_path"].removeprefix("file://"), self.output_dir.name)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            words,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern):
        """The first match of `pattern` in the output."""
        return self.until(lambda: re.search(pattern, self.text), repr(pattern))

    def until(self, condition, what="it", timeout=600.0):
        """What `condition` gives as soon as that is something, while the driver runs."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            has_ended = self.process.poll() is not None
            if has_ended:
                self._reader.join(timeout=60)
            if found := condition():
                return found
            assert not has_ended, f"ended before {what} came:\n{self.text}"
            time.sleep(0.01)
        raise AssertionError(f"{what} did not come in {timeout} s:\n{self.text}")

    def finish(self, timeout=600.0):
        """The exit code."""
        try:
            code = self.process.wait(timeout=timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
        self._reader.join(timeout=60)
        return code

    def pids(self, attempt=1):
        """Process numbers of the workers of an attempt, by rank."""
        line = self.wait_for(rf"attempt {attempt}: (.*)").group(1)
        return {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d+) \(pid (\d+)\)", line)}

    def nodes(self, attempt=1):
        """Addresses of the nodes of an attempt."""
        return re.findall(r" on (\S+?)(?:;|$)", self.wait_for(rf"attempt {attempt}: (.*)").group(1))

    def log(self):
        """The records of trainer_log.jsonl in output_dir."""
        path = self.output_dir / "trainer_log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def weights(self):
        """The bytes of the final weights."""
        return (self.output_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def run_keys(tmp_path_factory):
    """A run file's keys: a small random llama, all of it trained for 12 updates, 2 workers."""
    from tiny import make_model, make_tokenizer

    home = tmp_path_factory.mktemp("runs")
    make_tokenizer(home / "model")
    make_model(home / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    rows = [
        {
            "instruction": f"Say the number {i} and the next {i % 5}.",
            "input": "",
            "output": "w " * i,
        }
        for i in range(1, 65)
    ]
    (home / "rows.json").write_text(json.dumps(rows))
    (home / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return {
        "model_name_or_path": str(home / "model"),
        "dataset": "rows",
        "dataset_dir": str(home),
        "template": "chatml",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 6,  # a step takes long enough to be stopped in
        "max_steps": 12,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "seed": 7,
        "fp32": True,  # the same arithmetic on every CPU
        "report_to": "none",
        "ray_num_workers": 2,
        "resources_per_worker": {"CPU": 1},
        "ray_storage_path": str(home / "saves"),
    }


@pytest.fixture(scope="session")
def launch_words():
    """Starts a command as a `Run`; what still runs at the end is killed."""
    started: list[Run] = []

    def start(words, environ, keys):
        started.append(Run(words, environ, keys))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def launch(ray_home, run_keys, tmp_path_factory, launch_words):
    """Starts `llmray COMMAND` with these keys; `name` is the last part of output_dir.

    `before` are lines of Python that the driver runs first, `words` those behind the file.
    """

    def start(name, *, address, environ=None, command="train", before="pass", words=(), **keys):
        home = tmp_path_factory.mktemp("launch")
        merged = {**run_keys, "output_dir": str(home.parent / "out" / name), **keys}
        file = home / "run.yaml"
        file.write_text(yaml.safe_dump(merged))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **WITHOUT_WATCHER, **(environ or {})}
        if address:
            variables["RAY_ADDRESS"] = address
        main = f"import sys\n{before}\nfrom llmray import cli\nsys.exit(cli.main())"
        command_line = [sys.executable, "-c", main, command, str(file), *words]
        return launch_words(command_line, variables, merged)

    return start


@pytest.fixture
def nothing_runs(ray_cluster):
    """Waits until no process of a run is left on the cluster; fails if one stays."""
    return functools.partial(wait_until_nothing_runs, ray_cluster[1])


@pytest.fixture
def nothing_runs_on_head(head):
    """The same on the cluster that takes jobs."""
    return functools.partial(wait_until_nothing_runs, head[SESSION])


def wait_until_nothing_runs(session_dir, timeout=300.0):
    deadline = time.monotonic() + timeout
    while left := actors(session_dir):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


def actors(session_dir):
    """Command lines of the cluster's processes that run or ran an actor."""
    name = os.path.basename(session_dir)
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not words or "raylet/raylet" not in words[0] or name not in " ".join(words):
            continue
        titles = _titles(process)
        idle = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_Autoscaling")
        found += [t for t in titles if t.startswith("ray::") and not t.startswith(idle)]
    return found


def _titles(process):
    """Command lines of a process's children; one that ends while it is looked at has none."""
    titles = []
    for child in process.children():
        try:
            titles.append(" ".join(child.cmdline()))
        except psutil.NoSuchProcess:  # a zombie is one too
            continue
    return titles


@pytest.fixture(scope="session")
def undisturbed(launch, ray_cluster):
    """A finished run of `run_keys` that nothing disturbed, with a canary among its secrets."""
    run = launch("undisturbed", address=ray_cluster[0], environ={"HF_TOKEN": "canary-7f3a9c"})
    pids = run.pids()
    run.environs = [Path(f"/proc/{pid}/environ").read_bytes() for pid in pids.values()]
    assert run.finish() == 0, run.text
    return run
