"""Arguments of experiment tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import SecretStr

from llmray.arguments.group import Field, Group, Names

# what report_to takes beside none and all
TRACKERS = ("tensorboard", "wandb", "swanlab")
# what it takes in transformers, and not here
OTHER_TRACKERS = (
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "mlflow",
    "neptune",
    "trackio",
)


class TrackingArguments(Group):
    """Where metrics are sent beside the run's own files."""

    report_to: Names = Field(
        ("none",), description="Trackers: tensorboard, wandb, swanlab; all or none."
    )
    logging_dir: str | None = Field(
        None, description="Folder of TensorBoard's files. Not given: runs in the run's directory."
    )
    run_name: str | None = Field(
        None, description="Name of the run in trackers. Not given: output_dir."
    )
    project: str = Field(
        "huggingface", description="Project in wandb, unless WANDB_PROJECT names another."
    )
    trackio_space_id: str | None = Field(
        None, description="Hugging Face Space that trackio's metrics go to."
    )
    trackio_bucket_id: str | None = Field(
        None, description="Hugging Face bucket that trackio's metrics go to."
    )
    trackio_static_space_id: str | None = Field(
        None, description="Static Space made of trackio's metrics at the end."
    )
    use_swanlab: bool = Field(False, description="Send metrics to SwanLab.")
    swanlab_project: str = Field("llamafactory", description="Project in SwanLab.")
    swanlab_workspace: str | None = Field(None, description="Workspace in SwanLab.")
    swanlab_run_name: str | None = Field(
        None, description="Name of the experiment in SwanLab. Not given: run_name."
    )
    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] = Field(
        "cloud",
        description="Send to SwanLab's service, keep files for its board here (local, needs "
        "swanboard), or for a later `swanlab sync` (offline).",
    )
    swanlab_api_key: SecretStr | None = Field(
        None, description="Access key of SwanLab, or SWANLAB_API_KEY in the environment."
    )
    swanlab_logdir: str | None = Field(
        None, description="Folder of SwanLab's files. Not given: swanlog in the run's directory."
    )
    swanlab_lark_webhook_url: SecretStr | None = Field(
        None, description="Lark address that SwanLab's notices go to."
    )
    swanlab_lark_secret: SecretStr | None = Field(
        None, description="Signing secret of that Lark address."
    )
