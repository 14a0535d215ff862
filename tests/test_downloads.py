"""Hubs: what each is asked, a server with Hugging Face's protocol, one download a node."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, hub_environment, hub_server
from tiny import make_model, make_tokenizer

from llmray import downloads, hub
from llmray.arguments.model import ModelArguments
from llmray.arguments.rlhf import RlhfArguments
from llmray.errors import ModelError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repository(tmp_path):
    make_tokenizer(tmp_path / "repository")
    return make_model(tmp_path / "repository")


# ---- what the packages of hubs are asked for ----------------------------------------------------

HUBS = [
    (None, "huggingface_hub", "hf_hub_token", "HF_TOKEN", "main"),
    ("USE_MODELSCOPE_HUB", "modelscope", "ms_hub_token", "MODELSCOPE_API_TOKEN", "master"),
    ("USE_OPENMIND_HUB", "openmind_hub", "om_hub_token", "OM_HUB_TOKEN", "main"),
]


@pytest.mark.parametrize(("variable", "package", "key", "secret", "branch"), HUBS)
def test_each_hub_is_asked_with_its_revision_cache_and_token(
    variable, package, key, secret, branch, repository, monkeypatch
):
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings))
        return str(repository)

    module = SimpleNamespace(snapshot_download=snapshot_download)
    if variable is None:
        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    else:
        monkeypatch.setitem(sys.modules, package, module)
        monkeypatch.setenv(variable, "1")
    given = {"model_revision": "v2", "cache_dir": "/somewhere", key: "hush"}
    assert hub.resolve("org/tiny", ModelArguments(**given)) == repository
    name, settings = asked.pop()
    unused = settings.pop("ignore_patterns")
    assert name == "org/tiny"
    assert settings == {"revision": "v2", "cache_dir": "/somewhere", "token": "hush"}
    assert "*.gguf" in unused
    assert "*.safetensors" not in unused
    hub.resolve("org/tiny", ModelArguments(), weights=False)
    _, settings = asked.pop()
    assert settings["revision"] == branch
    assert "*.safetensors" in settings["ignore_patterns"]
    monkeypatch.setenv(secret, "of the environment")
    hub.resolve("org/tiny", ModelArguments())
    assert asked.pop()[1]["token"] == "of the environment"


def test_adapters_come_from_the_same_hub_and_from_their_own_main_branch(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings["revision"]))
        return str(tmp_path)

    monkeypatch.setitem(
        sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download)
    )
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    given = ModelArguments(model_revision="v2")
    assert hub.resolve("org/adapter", given, kind="adapter") == tmp_path
    assert asked == [("org/adapter", None)]


@pytest.mark.parametrize(
    ("variable", "name", "extra"),
    [
        ("USE_MODELSCOPE_HUB", "ModelScope", "modelscope"),
        ("USE_OPENMIND_HUB", "Modelers", "openmind"),
    ],
)
def test_a_hub_whose_package_is_missing(variable, name, extra, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "1")
    for package in ("modelscope", "openmind_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"from {name}.*pip install 'llmray\[{extra}\]'"):
        hub.resolve("org/tiny", ModelArguments())
    make_model(tmp_path / "here")
    assert hub.resolve(tmp_path / "here", ModelArguments()) == tmp_path / "here"


def test_a_hub_that_fails_is_named_and_the_token_is_not(monkeypatch):
    def snapshot_download(name, **settings):
        raise RuntimeError(f"GET https://{settings['token']}@host: refused\nmore")

    monkeypatch.setenv("USE_OPENMIND_HUB", "1")
    monkeypatch.setitem(
        sys.modules, "openmind_hub", SimpleNamespace(snapshot_download=snapshot_download)
    )
    with pytest.raises(ModelError, match=r"Modelers gave none \(RuntimeError") as error:
        hub.resolve("org/tiny", ModelArguments(om_hub_token="hush-hush"))
    assert "hush-hush" not in str(error.value)
    assert "om_hub_token" in str(error.value)
    assert "hush" not in repr(downloads.Request("a", None, None, (), "hush"))


# ---- a server that speaks the protocol of Hugging Face's hub ------------------------------------


@pytest.fixture
def server(repository):
    with hub_server({"org/tiny": repository, "org/secret": repository}) as found:
        yield found


CODE = """
import json, sys
from llmray import hub
from llmray.arguments.model import ModelArguments
from llmray.errors import ModelError
for name, keys in json.loads(sys.argv[1]):
    try:
        print("OK", hub.resolve(name, ModelArguments(**keys)))
    except ModelError as error:
        print("NO", str(error).replace(chr(10), " "))
"""


def ask(endpoint, tmp_path, questions):
    """What `resolve` comes to in a process of its own, whose hub is at `endpoint`."""
    environ = {**os.environ, **hub_environment(endpoint, tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(questions)],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return done.stdout.splitlines()


def test_a_hub_over_http(server, repository, tmp_path):
    endpoint, seen = server
    questions = [
        ("org/tiny", {"model_revision": "v2", "hf_hub_token": "good"}),
        ("org/tiny", {"model_revision": "no-such"}),
        ("org/none", {}),
        ("org/secret", {"hf_hub_token": "bad"}),
    ]
    found, revision, missing, gated = ask(endpoint, tmp_path, questions)
    folder = Path(found.removeprefix("OK "))
    assert folder.name == COMMIT
    for path in repository.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert {token for _, path, token in seen if "tiny" in path} >= {"Bearer good"}
    assert "model_revision=no-such: the Hugging Face hub has org/tiny, but no such" in revision
    assert "org/none: there is no such folder here, and the Hugging Face hub gave none" in missing
    assert "token that may read it (HF_TOKEN or hf_hub_token)" in gated
    assert "bad" not in gated


def test_a_hub_that_does_not_answer_is_named(tmp_path):
    [line] = ask("http://127.0.0.1:9", tmp_path, [("org/tiny", {})])
    assert line.startswith("NO model_name_or_path=org/tiny: there is no such folder here, and the")
    assert "the Hugging Face hub gave none" in line
    assert "fetch it where there is a network" in line


# ---- one download a node ------------------------------------------------------------------------


def slow_download(repository, calls, seconds):
    def snapshot_download(name, **settings):
        with open(calls, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return str(repository)

    return snapshot_download


def resolve_in_process(repository, calls, seconds, answers):
    import huggingface_hub

    huggingface_hub.snapshot_download = slow_download(repository, calls, seconds)
    answers.put(str(hub.resolve("org/tiny", ModelArguments())))


def begin(*words):
    process = FORK.Process(target=resolve_in_process, args=words)
    process.start()
    return process


def test_processes_that_come_together_download_once(repository, tmp_path):
    calls, answers = tmp_path / "calls", FORK.Queue()
    processes = [begin(repository, calls, 0.5, answers) for _ in range(3)]
    assert {answers.get(timeout=600) for _ in processes} == {str(repository)}
    for process in processes:
        process.join()
    assert len(calls.read_text().splitlines()) == 1
    late = begin(repository, calls, 0, answers)  # a later run asks again: a branch may have moved
    late.join()
    assert len(calls.read_text().splitlines()) == 2


def test_a_process_that_dies_while_it_downloads_frees_the_others(repository, tmp_path):
    calls, answers = tmp_path / "calls", FORK.Queue()
    first = begin(repository, calls, 900, answers)
    while not calls.exists() or not calls.read_text():
        time.sleep(0.01)
    second = begin(repository, calls, 0, answers)
    second.join(0.3)
    assert second.is_alive(), "it waits"
    os.kill(first.pid, signal.SIGKILL)
    assert answers.get(timeout=600) == str(repository)
    second.join()
    assert len(calls.read_text().splitlines()) == 2


def test_workers_take_what_their_node_has_fetched(repository, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    monkeypatch.setattr("huggingface_hub.snapshot_download", slow_download(repository, calls, 0))
    hub.resolve("org/tiny", ModelArguments())
    with downloads.as_fetched():
        assert hub.resolve("org/tiny", ModelArguments()) == repository
        assert len(calls.read_text().splitlines()) == 1
        hub.resolve("org/tiny", ModelArguments(model_revision="v2"))  # another: it is fetched
    assert len(calls.read_text().splitlines()) == 2
    repository.rename(tmp_path / "moved")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", slow_download(tmp_path / "moved", calls, 0)
    )
    with downloads.as_fetched():
        assert hub.resolve("org/tiny", ModelArguments()) == tmp_path / "moved"


def test_a_nodes_preparation_fetches_adapters_and_the_reference_too(
    repository, tmp_path, monkeypatch
):
    """The reference's repository has branches of its own, unless it is the model's."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings["revision"]))
        return str({"org/adapter": adapter}.get(name, repository))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    given = ModelArguments(
        model_name_or_path="org/tiny",
        model_revision="v2",
        adapter_name_or_path=("org/adapter", str(adapter)),
    )
    assert hub.resolve_all(given, RlhfArguments()) == repository
    assert asked == [("org/adapter", None), ("org/tiny", "v2")]
    asked.clear()
    reference = RlhfArguments(ref_model="org/other", ref_model_adapters=("org/adapter",))
    assert hub.resolve_all(given, reference) == repository
    assert asked == [
        *[("org/adapter", None)] * 2,
        ("org/other", None),
        ("org/tiny", "v2"),
    ]
    asked.clear()
    hub.resolve_all(given, RlhfArguments(ref_model="org/tiny"))
    assert set(asked[1:]) == {("org/tiny", "v2")}


def test_a_reference_that_is_not_there_is_named_by_its_key(tmp_path):
    with pytest.raises(ModelError, match=r"ref_model=.*/none: there is no such folder"):
        hub.resolve(tmp_path / "none", ModelArguments(), kind="reference")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="that goes to ref_model_adapters"):
        hub.resolve(tmp_path, ModelArguments(), kind="reference")


def test_a_damaged_note_is_asked_anew(repository, cache, monkeypatch):
    calls = cache.parent / "calls"
    monkeypatch.setattr("huggingface_hub.snapshot_download", slow_download(repository, calls, 0))
    hub.resolve("org/tiny", ModelArguments())
    [note] = (cache / "downloads").glob("*.json")
    note.write_text("{")
    with downloads.as_fetched():
        assert hub.resolve("org/tiny", ModelArguments()) == repository
