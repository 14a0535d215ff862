"""Arguments of multiple-choice benchmarks."""

from __future__ import annotations

from typing import Literal

from llmray.arguments.group import Field, Group, Int


class EvaluationArguments(Group):
    """Everything about benchmarks; `seed` is that of training."""

    task: Literal["mmlu_test", "ceval_validation", "cmmlu_test"] | None = Field(
        None, description="Benchmark and split."
    )
    task_dir: str = Field("evaluation", description="Folder of the benchmarks' files.")
    batch_size: Int = Field(4, ge=1, description="Questions that a device answers at once.")
    lang: Literal["en", "zh"] = Field("en", description="Language of the questions' frame.")
    n_shot: Int = Field(5, ge=0, description="Solved examples before each question.")
    save_dir: str | None = Field(None, description="Folder of the results; it must not exist yet.")
    download_mode: Literal[
        "reuse_dataset_if_exists", "reuse_cache_if_exists", "force_redownload"
    ] = Field(
        "reuse_dataset_if_exists", description="Whether benchmarks that are there are used again."
    )
