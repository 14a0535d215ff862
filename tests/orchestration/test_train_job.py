"""`llmray train` on a cluster: placement, refusals, errors, signals, secrets, files."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.orchestration.conftest import actors

pytestmark = pytest.mark.ray


def test_final_files_are_in_output_dir_and_checkpoints_in_the_run_directory(undisturbed):
    final = set(os.listdir(undisturbed.output_dir))
    expected = {"model.safetensors", "config.json", "tokenizer.json", "trainer_log.jsonl"}
    expected |= {"train_results.json", "all_results.json", "run_arguments.yaml"}
    assert expected <= final
    assert not [name for name in final if name.startswith((".", "checkpoint"))]
    kept = {name for name in os.listdir(undisturbed.run_dir) if name.startswith("checkpoint-")}
    assert kept == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
    assert [record["current_steps"] for record in undisturbed.log()] == list(range(1, 13))


def test_first_line_says_which_cluster_and_pack_takes_one_node(undisturbed, ray_address):
    assert undisturbed.lines[0] == f"Ray: joined the cluster at {ray_address}, 3 node(s)"
    assert len(undisturbed.nodes()) == 1
    assert "Traceback" not in undisturbed.text


def test_secret_is_in_no_file_no_output_and_no_runtime_environment(undisturbed, ray_cluster):
    canary = b"canary-7f3a9c"
    assert canary.decode() not in undisturbed.text
    assert not any(canary in environ for environ in undisturbed.environs)
    places = [Path(ray_cluster[1]), undisturbed.run_dir, undisturbed.output_dir]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if canary in path.read_bytes()] == []


def test_losses_equal_those_of_one_process_without_ray(undisturbed, launch, ray_home):
    """Two workers with batches of 2 and one process with batches of 4 take the same steps."""
    alone = launch("alone", address=None, use_ray=False, per_device_train_batch_size=4)
    assert alone.finish() == 0, alone.text
    losses = [(record["loss"], record["lr"]) for record in alone.log()]
    expected = [(record["loss"], record["lr"]) for record in undisturbed.log()]
    for ours, theirs in zip(expected, losses, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert expected[-1][0] < expected[0][0]


def test_more_workers_than_the_cluster_holds_are_refused(launch, ray_address):
    run = launch("too-many", address=ray_address, ray_num_workers=9)
    assert run.finish() == 1
    assert "needs 9 CPU (9 workers with 1 each), the cluster has 6" in run.text
    assert "Traceback" not in run.text
    assert not run.output_dir.exists()


def test_failures_beyond_those_allowed_end_the_run_with_a_way_on(launch, ray_address):
    run = launch("too-often", address=ray_address, ray_max_failures=0)
    pids = run.pids()
    run.wait_for(r"step 5/12")
    os.kill(pids[1], signal.SIGKILL)
    assert run.finish() == 1
    assert "rank 1 died: its process or node is gone. The run failed more than" in run.text
    assert "ray_max_failures=0 times" in run.text
    assert "resume_from_checkpoint: true" in run.text
    assert "Traceback" not in run.text
    assert (run.run_dir / "checkpoint-4").is_dir()


def test_error_of_the_user_in_a_worker_is_one_message_and_no_retry(
    undisturbed, launch, ray_address
):
    run = launch("undisturbed", address=ray_address)
    assert run.output_dir == undisturbed.output_dir
    assert run.finish() == 1
    assert "is at step 12 of 12: 0 steps remain" in run.text
    assert "attempt 2" not in run.text
    assert "Traceback" not in run.text


def test_a_signal_while_workers_start_ends_the_run_at_once(
    launch, ray_address, ray_cluster, nothing_runs
):
    nothing_runs()  # of the test before, whose controller would be taken for this run's
    run = launch("stopped-early", address=ray_address)
    run.until(lambda: any("TrainController" in title for title in actors(ray_cluster[1])))
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.finish() == 143, run.text
    assert run.lines[-1] == "stopped by SIGTERM"
    nothing_runs()


def test_a_signal_while_the_driver_prepares_ends_the_run_at_once(launch, ray_address, nothing_runs):
    run = launch("stopped-at-once", address=ray_address)
    run.wait_for(r"Ray: joined")
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.finish() == 143, run.text
    assert run.lines[-1] == "stopped by SIGTERM"
    nothing_runs()


def test_without_a_cluster_one_is_started_and_ended(launch, undisturbed):
    keys = {"max_steps": 1, "save_strategy": "no", "ray_init_kwargs": {"address": "local"}}
    keys["ray_num_workers"] = 1
    run = launch("private", address=None, environ={"RAY_AUTH_MODE": "disabled"}, **keys)
    started = run.wait_for(r"Ray: started a local cluster")
    assert started.start() == 0
    pids = run.pids()
    assert run.finish() == 0, run.text
    assert not any(lives(pid) for pid in pids.values())


@pytest.mark.slow
def test_a_signal_to_the_group_of_a_cluster_of_its_own_saves(launch, undisturbed):
    """Ctrl-C in a terminal and `timeout` send theirs to the group: workers go on until all is
    saved."""
    keys = {"save_steps": 100, "ray_init_kwargs": {"address": "local"}, "ray_num_workers": 1}
    run = launch("private-stopped", address=None, environ={"RAY_AUTH_MODE": "disabled"}, **keys)
    run.wait_for(r"step 2/12")
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.finish() == 143, run.text
    assert run.lines[-1] == f"stopped by SIGTERM, saved in {run.run_dir}"
    assert list(run.run_dir.glob("checkpoint-*/manifest.json"))
    assert not any(lives(pid) for pid in run.pids().values())


def lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_workers_predict_what_one_process_does_also_when_one_of_them_dies(
    launch, ray_address, nothing_runs
):
    """A worker is killed while it generates: what was trained stays, and is predicted with."""
    keys = {
        "val_size": 12,
        "max_steps": 4,
        "do_predict": True,
        "predict_with_generate": True,
        "do_sample": False,
        "max_new_tokens": 100,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    run = launch("predicted", address=ray_address, **keys)
    run.wait_for("generating responses to 12 rows")
    os.kill(run.pids()[1], signal.SIGKILL)
    assert run.finish() == 0, run.text
    assert "attempt 2" in run.text
    assert [record["current_steps"] for record in run.log() if "loss" in record] == [1, 2, 3, 4]
    keys |= {"use_ray": False, "per_device_train_batch_size": 4}
    alone = launch("predicted-alone", address=None, **keys)
    assert alone.finish() == 0, alone.text
    texts = [(one.output_dir / "generated_predictions.jsonl").read_text() for one in (run, alone)]
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 12


def test_model_and_adapter_are_fetched_once_for_all_workers(
    launch, ray_address, run_keys, tmp_path
):
    """From a server: each file once, and the hub is asked for each repository once, not by
    workers."""
    from hub_server import hub_environment, hub_server
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = Path(run_keys["model_name_or_path"])
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    folders = {"org/tiny": model, "org/adapter": tmp_path / "adapter"}
    keys = {"model_name_or_path": "org/tiny", "adapter_name_or_path": "org/adapter"}
    with hub_server(folders) as (endpoint, seen):
        environ = hub_environment(endpoint, tmp_path / "home")
        run = launch(
            "fetched",
            address=ray_address,
            environ=environ,
            finetuning_type="lora",
            max_steps=2,
            gradient_accumulation_steps=1,
            **keys,
        )
        assert run.finish() == 0, run.text
    gets = [path for method, path, _ in seen if method == "GET"]
    assert any(path.endswith("/model.safetensors") for path in gets)
    assert any(path.endswith("/adapter_model.safetensors") for path in gets)
    assert {path: gets.count(path) for path in gets} == dict.fromkeys(gets, 1)


def test_a_stream_is_read_by_the_workers(launch, ray_address, ray_home):
    """Two workers with batches of 2 and one process with batches of 4 take the same steps."""
    keys = {"streaming": True, "buffer_size": 8, "max_steps": 5, "save_strategy": "no"}
    before = set(ray_home.rglob("*.arrow"))
    together = launch("stream", address=ray_address, placement_strategy="SPREAD", **keys)
    assert together.finish() == 0, together.text
    alone = launch(
        "stream-alone", address=None, use_ray=False, per_device_train_batch_size=4, **keys
    )
    assert alone.finish() == 0, alone.text
    assert set(ray_home.rglob("*.arrow")) == before, "nothing is prepared"
    losses = [[record["loss"] for record in run.log()] for run in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
