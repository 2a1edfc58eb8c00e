"""Running a command of `prag` as a job on a Ray cluster, under a name that is the same for the same work."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import jobs
from cluster.jobs import JobServerError
from prag_core.config import Config
from prag_core.config_file import dump_config
from prag_core.errors import ClusterError, ConfigError
from prag_core.identity import fingerprint, is_checksum

CONFIG_FILE = "prag-config.yaml"
# Machine facts: the same work with others of them is the same job still.
_NOT_THE_WORK = {"run"}


@dataclass(frozen=True)
class JobOutcome:
    """What became of a submission: the job's id, whether it was started now, and its exit code once it ended."""

    id: str
    new: bool
    exit_code: int | None
    message: str = ""


def job_name(config: Config, command: Sequence[str]) -> str:
    """Return the name of the job that a command is for a configuration: the same work has the same name."""
    work = config.model_dump(mode="json", exclude=_NOT_THE_WORK)
    return f"prag-{command[0]}-{fingerprint([list(command), work])}"


def submit(
    config: Config,
    command: Sequence[str],
    address: str,
    environment: Mapping[str, str],
    write: Callable[[str], None],
    *,
    wait: bool = True,
) -> JobOutcome:
    """Run `prag COMMAND` with this configuration on the cluster of a job server; where it runs already, follow that.

    The configuration travels with the job. The package must be installed on the cluster, as in the image.

    Args:
        config: With all its overrides.
        command: A command of `prag` that takes `--config`, with its options.
        address: The URL of the job server.
        environment: Variables for the job and its workers.
        write: Takes the job's output.
        wait: Whether to follow the job to its end.

    Raises:
        ConfigError: when the configuration names a file relative to this folder, which the cluster has not.
        ClusterError: when the job server cannot be reached, or refuses.
    """
    _refuse_relative(config)
    entrypoint = shlex.join(["prag", command[0], "--config", CONFIG_FILE, *command[1:]])
    try:
        client = jobs.connect(address)
        with tempfile.TemporaryDirectory(prefix="prag-submit-") as folder:
            (Path(folder) / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
            job = jobs.submit(client, job_name(config, command), entrypoint, Path(folder), environment)
        write(f"job {job.id}: {'submitted' if job.new else 'runs already; following it'}\n")
        if not wait:
            return JobOutcome(job.id, job.new, None)
        ended = jobs.follow(client, job.id, write)
    except JobServerError as error:
        raise ClusterError(
            str(error), f"check --address ({address}) and that the cluster runs; a job that was submitted goes on"
        ) from None
    # Ray repeats the end of the output after its first line.
    message = ended.message.partition("\n")[0].partition(", last available logs")[0]
    return JobOutcome(job.id, job.new, ended.exit_code, f"{ended.status.lower()}: {message}".strip(": "))


def _refuse_relative(config: Config) -> None:
    start = config.train.initial_adapter
    named = {
        "store": config.store,
        "corpus.path": config.corpus.path,
        "augment.import_file": config.augment.import_file,
        "train.initial_adapter": None if start and is_checksum(start) else start,
    }
    relative = [key for key, path in named.items() if path and "://" not in path and not Path(path).is_absolute()]
    if config.model.name.startswith(".") or (
        Path(config.model.name).is_dir() and not Path(config.model.name).is_absolute()
    ):
        relative.append("model.name")
    if relative:
        raise ConfigError(
            f"{', '.join(relative)}: relative to this folder, which the cluster has not",
            "name what every node sees: s3://…, or an absolute path on a disk that all of them mount",
        )
