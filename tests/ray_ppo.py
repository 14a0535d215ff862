"""Runs of stage ppo on Ray: a tiny policy, a tiny reward model, and where its processes are."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
from tiny import build_model, make_model, make_tokenizer

from llmray.model import value_head

KEYS = {
    "stage": "ppo",
    "cutoff_len": 64,
    "max_new_tokens": 8,
    "top_p": 1.0,
    "top_k": 0,
    "temperature": 1.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 1,
    "ppo_buffer_size": 4,
    "reward_model_type": "full",
    "reward_resources_per_actor": {"CPU": 1},
    "reward_request_timeout_s": 20,
    "reward_timeout_s": 120,
}


def make_reward_model(folder: Path) -> str:
    """A llama with a value head, and its tokenizer."""
    make_tokenizer(folder)
    make_model(folder, amplify=3.0)
    value_head.write(value_head.create(build_model(), 0), folder)
    return str(folder)


def members(run):
    """Who runs where, as the run's newest attempt wrote it."""
    return json.loads((run.run_dir / "placement.json").read_text())["members"]


def workers(run):
    return [m for m in members(run) if m["role"].startswith("policy")]


def actors(run):
    return [m for m in members(run) if m["role"].startswith("reward")]


def reward_pids(session_dir, number, timeout=300.0):
    """The processes of reward actors of a cluster, as soon as so many have loaded their models."""
    name, deadline = Path(session_dir).name, time.monotonic() + timeout
    while len(found := [pid for pid, title in _titles(name) if is_loaded_actor(title)]) != number:
        assert time.monotonic() < deadline, f"{number} reward actors expected, found {found}"
        time.sleep(0.05)
    return found


def is_loaded_actor(title):
    return title.startswith("ray::RewardActor") and "__init__" not in title


def _titles(session):
    """Process numbers and titles of the children of a cluster's raylets."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not words or "raylet/raylet" not in words[0] or session not in " ".join(words):
            continue
        for child in process.children():
            try:
                yield child.pid, " ".join(child.cmdline())
            except psutil.NoSuchProcess:  # it ends just now
                continue


def logged_step(run):
    path = run.run_dir / "trainer_log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["current_steps"] if lines else 0


def wait_for_step(run, step):
    """Until the run has logged a step."""
    while logged_step(run) < step:
        assert run.process.poll() is None, run.text
        time.sleep(0.001)


def arrived(run, folder, phase):
    """Wait until both workers are held in a phase; returns what lets them go on."""
    while not all((folder / f"{phase}-{rank}").exists() for rank in range(2)):
        assert run.process.poll() is None, run.text
        time.sleep(0.01)
    return (folder / f"{phase}-go").touch


def told(run):
    """What a run logged, without what a clock says."""
    return [
        {
            k: v
            for k, v in record.items()
            if not any(w in k for w in ("time", "second", "share_", "idle"))
        }
        for record in run.log()
    ]


def files(run):
    """The bytes of what the policy learned."""
    return {path.name: path.read_bytes() for path in run.output_dir.glob("*.safetensors")}
