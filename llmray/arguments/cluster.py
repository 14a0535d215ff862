"""Arguments of the cluster: whether and how the run is spread by Ray."""

from __future__ import annotations

from typing import Literal

from llmray.arguments.group import Field, Group, Int, Object, PathPart

# keys that start the workers on Ray where use_ray is not given
STARTS_RAY = (
    *("ray_run_name", "ray_storage_path", "ray_num_workers"),
    *("resources_per_worker", "placement_strategy"),
)

RAY_KEYS = (
    "ray_run_name",
    "ray_storage_path",
    "ray_num_workers",
    "resources_per_worker",
    "placement_strategy",
)


class ClusterArguments(Group):
    """Everything about Ray. `None` stands for not given; the properties say what then holds."""

    use_ray: bool | None = Field(
        None,
        description="Train in workers that Ray starts. Not given: when USE_RAY is set or one of "
        f"{', '.join(RAY_KEYS)} is.",
    )
    ray_run_name: PathPart | None = Field(
        None,
        min_length=1,
        description="Name of the run; its checkpoints lie in <ray_storage_path>/<ray_run_name>. "
        "Not given: the last part of output_dir.",
    )
    ray_storage_path: str | None = Field(
        None,
        min_length=1,
        description="Folder or address (s3://, gs://, hdfs://) of runs, visible to all nodes. Not "
        "given: ./saves.",
    )
    ray_num_workers: Int | None = Field(
        None, ge=1, description="Workers, each with the resources of one. Not given: 1."
    )
    resources_per_worker: Object | None = Field(
        None,
        description='Resources of each worker, a mapping or JSON such as {"GPU": 1}; {"CPU": 2} '
        'trains on CPU; fractions and own resources count. Not given: {"GPU": 1}.',
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = Field(
        None,
        description="How workers lie on nodes: together or apart if possible, or strictly so. Not "
        "given: PACK.",
    )
    ray_init_kwargs: Object | None = Field(
        None, description="Further arguments of ray.init, as a mapping or a JSON object."
    )
    ray_max_failures: Int = Field(
        3,
        ge=-1,
        description="Failures after which the run restarts from its newest checkpoint; -1 for "
        "any number.",
    )
    master_addr: str | None = Field(
        None, description="Address at which workers meet. Not given: chosen on the first worker."
    )
    master_port: Int | None = Field(
        None, ge=1, le=65535, description="Port at which workers meet. Not given: a free one."
    )

    @property
    def num_workers(self) -> int:
        """The number of workers, 1 where none is given."""
        return self.ray_num_workers or 1

    @property
    def resources(self) -> dict[str, float]:
        """The resources of a worker, one GPU where none are given."""
        return dict(self.resources_per_worker or {"GPU": 1})

    @property
    def storage_path(self) -> str:
        """Where runs are kept, `./saves` where nothing is given."""
        return self.ray_storage_path or "./saves"

    @property
    def strategy(self) -> str:
        """The placement strategy, PACK where none is given."""
        return self.placement_strategy or "PACK"

    @property
    def ray_enabled(self) -> bool:
        """Whether Ray starts the workers: `use_ray` where given, else whether a Ray key is."""
        if self.use_ray is not None:
            return self.use_ray
        return any(getattr(self, key) is not None for key in STARTS_RAY)
