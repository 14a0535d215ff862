import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmray import launch
from llmray.errors import ArgumentsError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def install(count: int) -> None:
        monkeypatch.setattr(launch, "_visible_gpus", lambda: count)

    return install


@pytest.mark.parametrize(
    ("count", "environ", "expected"),
    [
        (0, {}, None),
        (1, {}, None),
        (4, {}, launch.Ranks(4)),
        (4, {"NPROC_PER_NODE": "2"}, launch.Ranks(2)),
        (4, {"NPROC_PER_NODE": "1"}, None),
        (1, {"FORCE_TORCHRUN": "1"}, launch.Ranks(1)),
        (0, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}, launch.Ranks(2)),
        (4, {"WORLD_SIZE": "4"}, None),
        (4, {"MASTER_PORT": "29511"}, launch.Ranks(4, master_port=29511)),
        (
            8,
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
            launch.Ranks(8, 2, 1, "10.0.0.1", 29500),
        ),
    ],
)
def test_ranks_follow_devices_and_variables(
    count: int, environ: dict[str, str], expected: launch.Ranks | None, gpus
) -> None:
    gpus(count)
    assert launch.plan(False, environ) == expected


def test_ray_starts_its_own_workers(gpus) -> None:
    gpus(8)
    assert launch.plan(True, {}) is None


@pytest.mark.parametrize(
    ("ray_enabled", "environ", "text"),
    [
        (True, {"FORCE_TORCHRUN": "1"}, "use_ray: false"),
        (False, {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        (False, {"NNODES": "two"}, "NNODES=two"),
        (False, {"NNODES": "2", "NODE_RANK": "2"}, "at most 1"),
        (False, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0"),
    ],
)
def test_contradicting_variables_are_refused(
    ray_enabled: bool, environ: dict[str, str], text: str, gpus
) -> None:
    gpus(1)
    with pytest.raises(ArgumentsError, match=text):
        launch.plan(ray_enabled, environ)


STARTER = """
import sys
from llmray import launch
raise SystemExit(launch.torchrun(launch.Ranks(2), sys.argv[1:]))
"""

RANK = """
import os, pathlib, signal, sys, time
here, deed = pathlib.Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
if deed == "wait":
    def stop(number, frame):
        (here / f"stopped{rank}").write_text(str(number))
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, stop)
(here / f"started{rank}").write_text(os.environ["WORLD_SIZE"])
if deed == "fail" and rank == "1":
    raise SystemExit(2)
if deed == "die" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if deed != "end":
    time.sleep(900)
"""


@pytest.fixture
def ranks_script(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "starter.py").write_text(STARTER)
    return tmp_path


@pytest.mark.parametrize(("deed", "code"), [("end", 0), ("fail", 2), ("die", 1)])
def test_torchrun_ends_with_the_code_of_its_ranks(deed: str, code: int, ranks_script: Path) -> None:
    here = str(ranks_script)
    done = subprocess.run(
        [sys.executable, f"{here}/starter.py", f"{here}/rank.py", here, deed],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert (ranks_script / "started0").read_text() == "2"
    assert "Traceback" not in done.stderr
    assert ("SIGKILL" in done.stderr) == (deed == "die")


def test_torchrun_hands_a_signal_to_all_ranks_and_waits(ranks_script: Path) -> None:
    here = str(ranks_script)
    process = subprocess.Popen(
        [sys.executable, f"{here}/starter.py", f"{here}/rank.py", here, "wait"],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 600
    while not all((ranks_script / f"started{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=800)
    assert process.returncode == 128 + signal.SIGTERM
    assert all((ranks_script / f"stopped{rank}").exists() for rank in (0, 1))
    assert "Traceback" not in err


MACHINE = """
import os, sys
from llmray import launch
raise SystemExit(launch.torchrun(launch.plan(False, os.environ), sys.argv[1:]))
"""

MEMBER = """
import os, pathlib, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "PYTORCH_CUDA_ALLOC_CONF")
facts = " ".join(os.environ[name] for name in names)
(pathlib.Path(sys.argv[1]) / os.environ["GROUP_RANK"]).write_text(facts)
"""


def test_two_machines_meet_where_the_variables_say(tmp_path: Path) -> None:
    (tmp_path / "machine.py").write_text(MACHINE)
    (tmp_path / "member.py").write_text(MEMBER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [sys.executable, f"{tmp_path}/machine.py", f"{tmp_path}/member.py", str(tmp_path)]
    shared = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    machines = [
        subprocess.Popen(words, env={**os.environ, **shared, "NODE_RANK": rank}, stderr=-1)
        for rank in ("0", "1")
    ]
    for machine in machines:
        _, said = machine.communicate(timeout=800)
        assert machine.returncode == 0, said.decode()
    for rank in ("0", "1"):
        facts = (tmp_path / rank).read_text()
        assert facts == f"{rank} 2 1 {port} expandable_segments:True"
