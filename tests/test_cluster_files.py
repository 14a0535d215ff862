"""The files of cluster/: Ray's own validator, the fields of KubeRay in use, Slurm's script at work.

KUBERAY_SCHEMA names a file with KubeRay's schemas (JSON, or .gz of it, as {"schemas": {kind: …}});
where it is given the manifest is checked against it, and the pinned fields too.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llmray.arguments import environment
from llmray.arguments.loading import load

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"

# Fields of the manifest that stand in KubeRay's own schema; what lies in pods is Kubernetes'.
RAYJOB_FIELDS = """
entrypoint submissionMode shutdownAfterJobFinishes ttlSecondsAfterFinished backoffLimit
runtimeEnvYAML rayClusterSpec rayClusterSpec.rayVersion rayClusterSpec.authOptions
rayClusterSpec.authOptions.mode rayClusterSpec.headGroupSpec
rayClusterSpec.headGroupSpec.rayStartParams rayClusterSpec.headGroupSpec.template
rayClusterSpec.workerGroupSpecs rayClusterSpec.workerGroupSpecs.groupName
rayClusterSpec.workerGroupSpecs.replicas rayClusterSpec.workerGroupSpecs.minReplicas
rayClusterSpec.workerGroupSpecs.maxReplicas rayClusterSpec.workerGroupSpecs.rayStartParams
rayClusterSpec.workerGroupSpecs.template
"""


# ---- the cluster launcher ---------------------------------------------------------------------


def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "launcher.yaml").read_text())


def validate(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = prepare_config(config)
    validate_config(complete)
    return complete


def test_launcher_is_what_ray_up_takes() -> None:
    complete = validate(launcher())
    assert complete["available_node_types"]["gpu"]["max_workers"] == complete["max_workers"]
    assert complete["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_the_validator_would_see_a_mistake() -> None:
    with pytest.raises(Exception, match="idle_minutes"):
        validate(launcher() | {"idle_minutes": 5})


def test_launched_nodes_have_a_token() -> None:
    config = launcher()
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in config[commands][-1]


# ---- KubeRay ----------------------------------------------------------------------------------


def manifests() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())
    return {document["kind"]: document for document in documents}


def fields(value: Any, path: tuple[str, ...] = ()) -> set[str]:
    """Dotted names of what stands in a spec; pods and parameters of `ray start` are left whole."""
    if isinstance(value, list):
        return {name for item in value for name in fields(item, path)}
    found = {".".join(path)} if path else set()
    if isinstance(value, dict) and (not path or path[-1] not in ("template", "rayStartParams")):
        found |= {name for key, item in value.items() for name in fields(item, (*path, key))}
    return found


def test_manifest_uses_the_fields_that_were_checked() -> None:
    assert fields(manifests()["RayJob"]["spec"]) == set(RAYJOB_FIELDS.split())


def closed(schema: Any) -> Any:
    """A schema in which a field that it does not name is an error, as KubeRay's are."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(item) for key, item in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


@pytest.mark.skipif("KUBERAY_SCHEMA" not in os.environ, reason="KUBERAY_SCHEMA names no schema")
def test_manifest_fits_the_schema_of_kuberay() -> None:
    path = Path(os.environ["KUBERAY_SCHEMA"])
    raw = path.read_bytes()
    schemas = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["schemas"]
    schema = closed(schemas["RayJob"])
    schema["properties"]["metadata"] = {"type": "object"}
    job = manifests()["RayJob"]
    jsonschema.validate(job, schema)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["replicas"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replicas"):
        jsonschema.validate(job, schema)


def test_parts_of_the_manifest_fit_together() -> None:
    found = manifests()
    spec = found["RayJob"]["spec"]
    pods = [
        group["template"]["spec"]
        for group in (
            spec["rayClusterSpec"]["headGroupSpec"],
            *spec["rayClusterSpec"]["workerGroupSpecs"],
        )
    ]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
        names = {item["name"] for item in container["env"]} - {"HF_TOKEN"}
        assert names <= set(environment.VARIABLES)
    assert pods[0]["volumes"][1]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert spec["entrypoint"] == "llmray train /run/llmray/run.yaml"


def test_run_of_the_manifest_loads_and_asks_for_what_its_workers_have() -> None:
    found = manifests()
    arguments = load(yaml.safe_load(found["ConfigMap"]["data"]["run.yaml"]), environ={})
    [group] = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert arguments.cluster.num_workers == gpus
    assert arguments.cluster.resources == {"GPU": 1}


# ---- jobs and containers ----------------------------------------------------------------------


def test_environment_of_jobs_is_one_of_ray_and_holds_no_secret() -> None:
    from ray.runtime_env import RuntimeEnv

    from llmray.orchestration import cluster

    written = yaml.safe_load((CLUSTER / "job_env.yaml").read_text())
    RuntimeEnv(**written)
    assert int(written["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert not [name for name in written["env_vars"] if cluster.SECRET_NAME.search(name)]


@pytest.mark.parametrize("name", ["cpu.Dockerfile", "cuda.Dockerfile"])
def test_container_files_copy_what_is_here_and_install_what_was_tested(name: str) -> None:
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split())
    assert "grep '^torch==' constraints.txt" in text
    assert '-c constraints.txt ".[cluster]"' in text
    assert re.search(r"^FROM python:3\.1[1-4]", text, re.M)
    assert text.index("USER llmray") > text.index("pip install")


# ---- Slurm ------------------------------------------------------------------------------------

FAKES = {
    "ray": """
        if [ "$1" = status ]; then  # there when both have started
            grep -q '^token' "$NOTES" && grep -q '^srun' "$NOTES" || exit 1
            printf 'Active:\\n 1 node_a\\n 1 node_b\\nPending:\\n'
            exit 0
        fi
        echo "ray $*" >> "$NOTES"
        echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE" >> "$NOTES"
        exec sleep 60
    """,
    "srun": """
        echo "srun $*" >> "$NOTES"
        exec sleep 60
    """,
    "scontrol": """
        printf 'alpha\\nbeta\\n'
    """,
    "hostname": """
        echo 127.0.1.1 10.0.0.7
    """,
    "llmray": """
        echo "llmray $* at $RAY_ADDRESS" >> "$NOTES"
        [ "$2" = fail.yaml ] && exit 2
        [ "$2" = end.yaml ] && exit 0
        trap 'sleep 1; echo saved >> "$NOTES"; exit 143' TERM
        echo waits >> "$NOTES"
        while true; do sleep 0.1; done
    """,
}


@pytest.fixture
def slurm(tmp_path: Path) -> Any:
    """Starts the script beside fakes of what it calls; they note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    notes = tmp_path / "notes"
    environ = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "NOTES": str(notes),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "alpha,beta",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }

    def start(*words: str) -> tuple[subprocess.Popen[str], Path]:
        command = [str(CLUSTER / "slurm.sh"), *words]
        return subprocess.Popen(
            command, env=environ, stdout=-1, stderr=subprocess.STDOUT, text=True
        ), notes

    return start


def test_slurm_script_is_bash_and_asks_for_what_it_uses() -> None:
    path = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n")
    options = re.findall(r"^#SBATCH (--[a-z-]+)=", text, re.M)
    assert {"--nodes", "--ntasks-per-node", "--time", "--signal", "--output"} <= set(options)
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(("file", "code"), [("end.yaml", 0), ("fail.yaml", 2)])
def test_slurm_script_starts_ray_everywhere_and_ends_with_the_code_of_the_run(
    file: str, code: int, slurm: Any
) -> None:
    process, notes = slurm(file, "max_steps=3")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    lines = notes.read_text().splitlines()
    [head] = [line for line in lines if line.startswith("ray start --head")]
    assert "--node-ip-address 10.0.0.7 --port 24711 --num-cpus 8" in head
    [others] = [line for line in lines if line.startswith("srun")]
    assert "--nodes=1 --ntasks-per-node=1 --nodelist=beta" in others
    assert others.endswith("ray start --block --address 10.0.0.7:24711 --num-cpus 8")
    assert "token 64 token" in lines
    assert f"llmray train {file} max_steps=3 at 10.0.0.7:24711" in lines


def test_slurm_script_hands_a_signal_to_the_run_and_waits_for_its_save(slurm: Any) -> None:
    process, notes = slurm("long.yaml")
    until = time.monotonic() + 600
    while not notes.exists() or "waits" not in notes.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 143, said
    assert "saved" in notes.read_text()
    assert "llmray ended with exit code 143" in said


def test_slurm_script_without_a_run_file_says_its_usage(slurm: Any) -> None:
    process, _ = slurm()
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "usage: sbatch" in said
