"""How each tracker is opened, written and ended: one row a tracker.

A sink is used from one thread, which is not the main one: neither library then takes over signals.
Console, code and command line are not sent: the command line may hold secrets.
"""

from __future__ import annotations

import atexit
import json
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from llmray.arguments.tracking import TrackingArguments

INIT_TIMEOUT_S = 45


@dataclass(frozen=True)
class Session:
    """What a tracker is told when it is opened."""

    run_id: str  # the same in every attempt of a run
    began: str  # when its first attempt did, as YYYYMMDD-HHMMSS
    step: int  # from where this attempt goes on
    name: str
    directory: Path  # local, of rank 0
    config: Mapping[str, Any]  # all arguments, secrets left out
    history: list[tuple[int, dict[str, float]]]  # what was logged up to `step`
    tracking: TrackingArguments
    environ: Mapping[str, str]
    group: str | None = None  # of the runs of a sweep, each with its own name and id


class Sink(Protocol):
    """One run that is open in a tracker."""

    where: str  # for people: an address or a folder

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of one step."""

    def finish(self, *, succeeded: bool) -> None:
        """Send what is left and end the run there."""


class Tracker(Protocol):
    """A row: what a tracker needs, and how it is opened."""

    @staticmethod
    def packages(tracking: TrackingArguments) -> dict[str, str]:
        """The packages that it needs, each with the line that installs it."""

    @staticmethod
    def missing_key(tracking: TrackingArguments, environ: Mapping[str, str]) -> str | None:
        """What is missing for its service; None where nothing is."""

    @staticmethod
    def open(session: Session) -> Sink:
        """Begin or resume the run."""


class TensorBoard:
    """Event files; one folder a run, in which a resumed run hides the steps that it repeats."""

    def __init__(self, session: Session) -> None:
        from tensorboardX import SummaryWriter

        folder = session.tracking.logging_dir or str(session.directory / "runs" / session.began)
        self.where = f"{folder} (tensorboard --logdir {folder})"
        repeated = session.step + 1 if session.step else None
        self._writer = SummaryWriter(
            folder,
            purge_step=repeated,
            flush_secs=10,
            filename_suffix=f".{session.step}",  # its names differ by seconds, and attempts may not
        )
        if not session.step:
            config = json.dumps(session.config, indent=2, default=str)
            self._writer.add_text("run_arguments", f"```json\n{config}\n```", 0)

    @staticmethod
    def packages(tracking: TrackingArguments) -> dict[str, str]:
        """The writer; the viewer is another package."""
        return {"tensorboardX": "pip install tensorboardX"}

    @staticmethod
    def missing_key(tracking: TrackingArguments, environ: Mapping[str, str]) -> str | None:
        """It sends nothing."""
        return None

    @staticmethod
    def open(session: Session) -> Sink:
        """Open the folder."""
        return TensorBoard(session)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self, *, succeeded: bool) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """Weights & Biases; the library reads WANDB_* itself, of which project and name go first."""

    def __init__(self, session: Session) -> None:
        import wandb

        environ = session.environ
        quiet = {} if "WANDB_SILENT" in environ else {"silent": True}
        console = {} if "WANDB_CONSOLE" in environ else {"console": "off"}
        name, run_id = environ.get("WANDB_NAME"), environ.get("WANDB_RUN_ID")
        if session.group is not None:
            name = run_id = None
        self._run = wandb.init(
            project=environ.get("WANDB_PROJECT") or session.tracking.project,
            name=name or session.name,
            id=run_id or session.run_id,
            group=session.group or environ.get("WANDB_RUN_GROUP"),
            resume="allow",
            dir=environ.get("WANDB_DIR") or str(session.directory),
            config=dict(session.config),
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                **quiet,
                **console,
            ),
        )
        folder = Path(self._run.dir).parent
        is_offline = self._run.settings.mode != "online"
        self.where = f"{folder} (wandb sync {folder})" if is_offline else str(self._run.url)

    @staticmethod
    def packages(tracking: TrackingArguments) -> dict[str, str]:
        """The library."""
        return {"wandb": "pip install wandb"}

    @staticmethod
    def missing_key(tracking: TrackingArguments, environ: Mapping[str, str]) -> str | None:
        """A key, unless WANDB_MODE keeps files here."""
        if environ.get("WANDB_MODE", "online") != "online":
            return None
        if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return None
        import wandb

        address = environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
        if _in_netrc(urlsplit(address).hostname or "", environ):
            return None
        return (
            "wandb has no key for its service. Set WANDB_API_KEY, or run `wandb login`, or set "
            "WANDB_MODE=offline to keep its files here."
        )

    @staticmethod
    def open(session: Session) -> Sink:
        """Begin or resume the run of that id."""
        return Wandb(session)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add to the history; steps that it has are left as they are."""
        self._run.log(dict(values), step=step)

    def finish(self, *, succeeded: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if succeeded else 1)


class SwanLab:
    """SwanLab; its local board knows no resume, so a resumed run writes its past there again."""

    def __init__(self, session: Session) -> None:
        import swanlab
        from swanlab.sdk.internal.pkg import console

        console.c.quiet = True  # it prints into the progress line; `where` says what is needed
        tracking = session.tracking
        key = tracking.swanlab_api_key
        self._run = swanlab.init(
            mode="online" if tracking.swanlab_mode == "cloud" else tracking.swanlab_mode,
            project=tracking.swanlab_project,
            workspace=tracking.swanlab_workspace,
            name=tracking.swanlab_run_name or session.name,
            id=session.run_id,
            group=session.group,
            resume="allow",
            log_dir=tracking.swanlab_logdir or str(session.directory / "swanlog"),
            config=dict(session.config),
            callbacks=_notices(tracking),
            settings=swanlab.Settings(
                interactive=False,
                terminal=swanlab.Settings.Terminal(proxy_type="none"),
                probe=swanlab.Settings.Probe(runtime=False, requirements=False, git=False),
                **({"api_key": key.get_secret_value()} if key else {}),
            ),
        )
        # at exit it would wait for a network without limit, and call what failed a success
        atexit.unregister(self._run._handle_atexit)
        self.where = self._describe(tracking.swanlab_mode)
        if tracking.swanlab_mode == "local":
            for step, values in session.history:
                self.log(values, step)

    def _describe(self, mode: str) -> str:
        folder = self._run.dir
        if mode == "cloud":
            return str(self._run.url)
        hint = f"swanlab watch {folder.parent}" if mode == "local" else f"swanlab sync {folder}"
        return f"{folder} ({hint})"

    @staticmethod
    def packages(tracking: TrackingArguments) -> dict[str, str]:
        """The library, and its board, without which it writes no local files."""
        needed = {"swanlab": "pip install swanlab"}
        if tracking.swanlab_mode == "local":
            needed["swanboard"] = "pip install 'swanlab[dashboard]', or write swanlab_mode: offline"
        return needed

    @staticmethod
    def missing_key(tracking: TrackingArguments, environ: Mapping[str, str]) -> str | None:
        """A key, in mode cloud."""
        if tracking.swanlab_mode != "cloud" or tracking.swanlab_api_key:
            return None
        if environ.get("SWANLAB_API_KEY"):
            return None
        import swanlab

        if swanlab.Settings().api_key:  # its own files, as `swanlab login` leaves them
            return None
        return (
            "swanlab has no key for its service. Set SWANLAB_API_KEY or swanlab_api_key, or run "
            "`swanlab login`, or write swanlab_mode: offline to keep its files here."
        )

    @staticmethod
    def open(session: Session) -> Sink:
        """Begin or resume the run of that id."""
        return SwanLab(session)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add to the history."""
        self._run.log(dict(values), step=step)

    def finish(self, *, succeeded: bool) -> None:
        """End the run."""
        if succeeded:
            self._run.finish()
        else:
            self._run.finish(state="crashed", error="The run ended before its last step.")


SINKS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "swanlab": SwanLab,
}


def _notices(tracking: TrackingArguments) -> list[Any]:
    """What sends SwanLab's notices to Lark, where an address is given."""
    url, secret = tracking.swanlab_lark_webhook_url, tracking.swanlab_lark_secret
    if url is None:
        return []
    from swanlab.plugin.notification import LarkCallback

    class Notice(LarkCallback):
        def _get_url(self) -> str:
            """Where the run is; of 0.10's own, the one of mode offline fails without a word."""
            return super()._get_url() if is_cloud else str(self._settings.log_dir)

    is_cloud = tracking.swanlab_mode == "cloud"
    signing = secret.get_secret_value() if secret else None
    return [Notice(url.get_secret_value(), signing, language="en")]


def _in_netrc(host: str, environ: Mapping[str, str]) -> bool:
    path = Path(environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
