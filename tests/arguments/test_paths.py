"""Relative paths become absolute once; names of hubs and addresses stay."""

from pathlib import Path

import pytest

from llmray.arguments import paths
from llmray.arguments.loading import load
from llmray.errors import ArgumentsError

BASE = {"model_name_or_path": "org/model", "dataset": "a", "output_dir": "out", "do_train": True}


def resolved(base, **keys):
    return paths.absolute(load(BASE | keys, environ={}), base).flat()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("output_dir", "out", "{base}/out"),
        ("output_dir", "./a/../out", "{base}/out"),
        ("output_dir", "/abs/out", "/abs/out"),
        ("output_dir", "s3://bucket/out", "s3://bucket/out"),
        ("output_dir", "~/out", "{user}/out"),
        ("dataset_dir", "data", "{base}/data"),
        ("dataset_dir", "ONLINE", "ONLINE"),
        ("dataset_dir", "REMOTE:org/data", "REMOTE:org/data"),
        ("cache_dir", "cache", "{base}/cache"),
        ("resume_from_checkpoint", "out/checkpoint-5", "{base}/out/checkpoint-5"),
        ("resume_from_checkpoint", True, True),
        ("model_name_or_path", "org/model", "org/model"),
        ("model_name_or_path", "org/here", "{base}/org/here"),
        ("model_name_or_path", "./missing", "{base}/missing"),
        ("model_name_or_path", "/abs/model.gguf", "/abs/model.gguf"),
        ("adapter_name_or_path", "org/here,org/adapter", ["{base}/org/here", "org/adapter"]),
        ("ray_storage_path", "saves", "{base}/saves"),
        ("ray_storage_path", "s3://bucket/saves", "s3://bucket/saves"),
        ("offload_folder", "offload", "offload"),
    ],
)
def test_paths(tmp_path, monkeypatch, key, value, expected):
    monkeypatch.setenv("HOME", "/home/user")
    (tmp_path / "org" / "here").mkdir(parents=True)

    def fill(text):
        return text.format(base=tmp_path, user="/home/user") if isinstance(text, str) else text

    wanted = [fill(item) for item in expected] if isinstance(expected, list) else fill(expected)
    assert resolved(tmp_path, **{key: value})[key] == wanted


def test_files_of_sets_in_the_run_file_are_made_absolute(tmp_path):
    sets = {"a": {"file_name": "rows.json", "num_samples": 3}, "b": {"hf_hub_url": "org/b"}}
    found = resolved(tmp_path, dataset_dir=sets)["dataset_dir"]
    assert found == {"a": {**sets["a"], "file_name": f"{tmp_path}/rows.json"}, "b": sets["b"]}


def test_the_default_storage_path_counts_on_ray_only(tmp_path):
    assert resolved(tmp_path, use_ray=True)["ray_storage_path"] == str(tmp_path / "saves")
    assert resolved(tmp_path)["ray_storage_path"] is None


def test_a_sweep_runs_on_ray_without_any_of_its_keys(tmp_path):
    search = {"learning_rate": {"grid": [1e-4, 1e-3]}}
    keys = {"eval_strategy": "steps", "eval_steps": 2, "val_size": 2, "tune": {"search": search}}
    assert resolved(tmp_path, **keys)["ray_storage_path"] == str(tmp_path / "saves")


def test_absolute_paths_are_left_alone(tmp_path):
    once = paths.absolute(load(BASE, environ={}), tmp_path)
    assert paths.absolute(once, Path("/elsewhere")) == once


def test_what_was_made_absolute_is_saved_and_loads(tmp_path):
    arguments = paths.absolute(load(BASE | {"use_ray": True}, environ={}), tmp_path)
    arguments.save(tmp_path / "run_arguments.yaml")
    assert load(tmp_path / "run_arguments.yaml", environ={}) == arguments


def test_where_relative_paths_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cwd = tmp_path / "cwd"
    home = {"LLMRAY_HOME": str(tmp_path / "home")}
    assert paths.base_directory(home, True, cwd) == tmp_path / "home"
    assert paths.base_directory(home, False, cwd) == tmp_path / "home"
    assert paths.base_directory({}, True, cwd) == tmp_path / "llmray"
    assert paths.base_directory({}, False, cwd) == cwd


def test_a_submitted_job_reads_what_was_sent_and_writes_to_its_home(tmp_path):
    sent, home = tmp_path / "sent", tmp_path / "home"
    for folder in (sent / "data", sent / "saves", sent / "model", home / "adapter", home / "model"):
        folder.mkdir(parents=True)
    keys = {"model_name_or_path": "model", "adapter_name_or_path": "adapter", "use_ray": True}
    flat = paths.absolute(load(BASE | keys, environ={}), home, sent).flat()
    assert flat["dataset_dir"] == str(sent / "data")
    assert flat["model_name_or_path"] == str(sent / "model")
    assert flat["adapter_name_or_path"] == [str(home / "adapter")]
    assert flat["output_dir"] == str(home / "out")
    assert flat["ray_storage_path"] == str(home / "saves")


def test_a_submitted_job_without_its_data_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ArgumentsError) as error:
        paths.absolute(load(BASE, environ={}), tmp_path / "home", tmp_path)
    said = str(error.value)
    assert said.startswith("dataset_dir=data is neither in the working directory that was sent")
    assert f"nor {tmp_path}/home/data." in said
    assert ".gitignore" in said
    assert "LLMRAY_HOME" in said
    (tmp_path / "home" / "data").mkdir(parents=True)
    paths.absolute(load(BASE, environ={}), tmp_path / "home", tmp_path)
