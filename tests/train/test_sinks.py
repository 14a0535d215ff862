"""What trackers really write, read back and compared with trainer_log.jsonl number by number.

wandb and SwanLab run in their offline modes; nothing here needs a network.
"""

import base64
import hashlib
import hmac
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from llmray.arguments.loading import load
from llmray.arguments.run import RunArguments
from llmray.train.observers import JsonLines, read_log
from llmray.train.trackers import Trackers, numbers

CANARIES = ("canary-key", "canary-secret", "canary-hook", "canary-token")
Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "swanlab-home"))


def arguments(directory: Path, **keys: object) -> RunArguments:
    run = {"model_name_or_path": "m", "dataset": "a", "do_train": True, "learning_rate": 2e-5}
    base = {"output_dir": str(directory), "run_name": "the run", "swanlab_mode": "offline"}
    return load(run | base | keys, environ={})


def train(run: RunArguments, start: int, stop: int, *, killed: bool = False) -> Trackers:
    """Log as a run from step `start` to `stop` would; a killed one never ends."""
    directory = Path(run.training.output_dir)
    directory.mkdir(exist_ok=True)
    observer = Trackers(run, directory, {"WANDB_MODE": "offline"})
    observers = (JsonLines(directory), observer)
    for each in observers:
        each.on_start(start, 10)
    for step in range(start + 1, stop + 1):
        record = {"current_steps": step, "total_steps": 10, "loss": 1 / (3 * step), "lr": 1e-5 / 7}
        if step % 2 == 0:
            record |= {"eval_loss": 2.5 / step, "rewards/chosen": -0.1 * step}
        for each in observers:
            each.on_log(record | {"epoch": step / 10, "elapsed_time": "0:00:01"})
    if not killed:
        for each in observers:
            each.on_end({"epoch": 1.0, "train_loss": 0.123456789, "eval_loss": 1.0})
        return observer
    for channel in observer._channels:  # what a kill leaves is on disk: let all of it get there
        channel.put(lambda sink: sink.finish(succeeded=False), last=True)
        channel.wait(600)
    return observer


def logged(directory: Path) -> Series:
    """What the trackers must hold: the log, and the figures of the run at its last step."""
    series: Series = {}
    records = read_log(directory / "trainer_log.jsonl")
    for record in records:
        for key, value in numbers(record).items():
            series.setdefault(key, []).append((record["current_steps"], value))
    return series | {"train_loss": [(records[-1]["current_steps"], 0.123456789)]}


def in_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        key: [(event.step, event.value) for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }


def wandb_records(path: Path) -> list:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, part, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def in_wandb(path: Path) -> Series:
    series: Series = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for key, value in row.items():
            if not key.startswith("_"):
                series.setdefault(key, []).append((row["_step"], value))
    return series


def swanlab_records(path: Path) -> list:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader = DataStoreReader()
    reader.open(path)
    return [Record.FromString(content) for content in reader]


def in_swanlab(path: Path) -> Series:
    series: Series = {}
    for record in swanlab_records(path):
        if record.HasField("scalar"):
            point = (record.scalar.step, record.scalar.value.number)
            series.setdefault(record.scalar.key, []).append(point)
    return series


def only(paths) -> Path:
    [path] = paths
    return path


def test_tensorboard_holds_the_log(tmp_path):
    """Its scalars are float32: 24 bits, 6e-8 of the value."""
    train(arguments(tmp_path, report_to="tensorboard"), 0, 6)
    found, expected = in_tensorboard(only((tmp_path / "runs").iterdir())), logged(tmp_path)
    assert found.keys() == expected.keys()
    for key, points in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points]
        values = [value for _, value in points]
        assert [value for _, value in found[key]] == pytest.approx(values, rel=1e-7)


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    """The second attempt goes on after step 3: what the first one wrote of 4 and 5 is hidden."""
    run = arguments(tmp_path, report_to="tensorboard")
    train(run, 0, 5, killed=True)
    train(run, 3, 6)
    folder = only((tmp_path / "runs").iterdir())
    assert len(list(folder.iterdir())) == 2
    assert [step for step, _ in in_tensorboard(folder)["loss"]] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_writes_where_logging_dir_says(tmp_path):
    train(arguments(tmp_path, report_to="tensorboard", logging_dir=str(tmp_path / "tb")), 0, 2)
    assert len(list((tmp_path / "tb").iterdir())) == 1
    assert not (tmp_path / "runs").exists()


def test_wandb_holds_the_log(tmp_path):
    train(arguments(tmp_path, report_to="wandb", project="ours"), 0, 6)
    path = only(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert in_wandb(path) == logged(tmp_path)
    [run] = [record.run for record in wandb_records(path) if record.HasField("run")][:1]
    assert (run.project, run.display_name) == ("ours", "the run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["learning_rate"] == 2e-5


def test_wandb_goes_on_under_the_same_id(tmp_path):
    run = arguments(tmp_path, report_to="wandb")
    first = train(run, 0, 5, killed=True)
    second = train(run, 3, 6)
    assert first.identity.run_id == second.identity.run_id
    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    ids = {r.run.run_id for path in paths for r in wandb_records(path) if r.HasField("run")}
    assert len(paths) == 2
    assert ids == {first.identity.run_id}
    assert [step for step, _ in in_wandb(paths[1])["loss"]] == [4, 5, 6]


def test_swanlab_holds_the_log(tmp_path):
    train(arguments(tmp_path, use_swanlab=True, swanlab_project="ours"), 0, 6)
    path = only(tmp_path.glob("swanlog/run-*/*.swanlab"))
    assert in_swanlab(path) == logged(tmp_path)
    start = next(r.start for r in swanlab_records(path) if r.HasField("start"))
    assert (start.project, start.name) == ("ours", "the run")
    config = yaml.safe_load((path.parent / "files" / "config.yaml").read_text())
    assert config["learning_rate"]["value"] == 2e-5


def test_swanlab_goes_on_under_the_same_id(tmp_path):
    run = arguments(tmp_path, use_swanlab=True, swanlab_logdir=str(tmp_path / "elsewhere"))
    first = train(run, 0, 5, killed=True)
    second = train(run, 3, 6)
    assert first.identity.run_id == second.identity.run_id
    paths = sorted(tmp_path.glob("elsewhere/run-*/*.swanlab"), key=lambda p: p.stat().st_mtime)
    records = [swanlab_records(path) for path in paths]
    starts = [record.start for each in records for record in each if record.HasField("start")]
    assert [start.id for start in starts] == [first.identity.run_id] * 2
    assert [step for step, _ in in_swanlab(paths[1])["loss"]] == [4, 5, 6]
    states = [
        record.finish.state for each in records for record in each if record.HasField("finish")
    ]
    assert states[0] != states[1]  # crashed, then done


def test_swanlab_board_shows_a_resumed_run_whole(tmp_path):
    """Its files for the board know no resume: the second attempt writes the first steps again."""
    pytest.importorskip("swanboard", reason="its dependencies are older than those tested here")
    run = arguments(tmp_path, use_swanlab=True, swanlab_mode="local")
    train(run, 0, 5, killed=True)
    train(run, 3, 6)
    newest = max(tmp_path.glob("swanlog/run-*"), key=lambda path: path.stat().st_mtime)
    lines = (newest / "logs" / "1" / "1000.log").read_text().splitlines()
    points = [(row["index"], row["data"]) for row in map(json.loads, lines)]
    assert points == logged(tmp_path)["loss"]


def test_no_secret_is_in_any_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["llmray", "train", "swanlab_api_key=canary-key"])
    run = arguments(
        tmp_path,
        report_to=["tensorboard", "wandb", "swanlab"],
        swanlab_api_key="canary-key",
        swanlab_lark_webhook_url="http://127.0.0.1:9/canary-hook",
        swanlab_lark_secret="canary-secret",
        hf_hub_token="canary-token",
    )
    train(run, 0, 2)
    run.save(tmp_path / "run_arguments.yaml")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = {path: path.read_bytes() for path in files}
    assert any(b"learning_rate" in text for path, text in content.items() if "wandb" in str(path))
    leaks = [(c, path) for c in CANARIES for path, text in content.items() if c.encode() in text]
    assert leaks == []


def test_lark_gets_a_signed_notice(tmp_path):
    """Lark signs the time and the secret: base64 of HMAC-SHA256 with them as the key."""
    bodies: list[dict] = []
    arrived = threading.Event()

    class Lark(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"code": 0}')
            arrived.set()

        def log_message(self, *words: object) -> None:
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Lark)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/hook"
        keys = {"swanlab_lark_webhook_url": url, "swanlab_lark_secret": "secret"}
        train(arguments(tmp_path, use_swanlab=True, **keys), 0, 2)
        assert arrived.wait(300)
    finally:
        server.shutdown()
    key = f"{bodies[0]['timestamp']}\nsecret".encode()
    assert (
        bodies[0]["sign"] == base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()
    )
    text = bodies[0]["content"]["text"]
    assert "completed successfully" in text
    assert f"Experiment Link: {tmp_path / 'swanlog'}" in text
