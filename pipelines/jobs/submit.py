"""Run a command of `prag` as a job on a Ray cluster; the same work always has the same job name."""

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
# The sections that describe machines and not the work do not change the name of the job.
_MACHINE_SECTIONS = {"run"}


@dataclass(frozen=True)
class JobOutcome:
    """A submitted job: its id, whether it was started now, and its exit code once it has ended."""

    id: str
    new: bool
    exit_code: int | None
    message: str = ""


def job_name(config: Config, command: Sequence[str]) -> str:
    """Return the name of the job for a command and a configuration."""
    work = config.model_dump(mode="json", exclude=_MACHINE_SECTIONS)
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
    """Run `prag COMMAND` with this configuration on the cluster of a job server, or follow it if it already runs.

    The configuration travels with the job. The package must be installed on the cluster, as in the image.

    Args:
        config: The configuration with all overrides.
        command: A command of `prag` that takes `--config`, with its options.
        address: The URL of the job server.
        environment: Variables for the job and its workers.
        write: Called with the job's output.
        wait: Whether to follow the job to its end.

    Raises:
        ConfigError: when the configuration names a file relative to this folder, which the cluster does not have.
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
    start, model = config.train.initial_adapter, Path(config.model.name)
    named = {
        "store": config.store,
        "corpus.path": config.corpus.path,
        "augment.import_file": config.augment.import_file,
        "train.initial_adapter": None if start and is_checksum(start) else start,
    }
    relative = [key for key, path in named.items() if path and "://" not in path and not Path(path).is_absolute()]
    if config.model.name.startswith(".") or (model.is_dir() and not model.is_absolute()):
        relative.append("model.name")
    if relative:
        raise ConfigError(
            f"{', '.join(relative)}: relative to this folder, which the cluster does not have",
            "name what every node sees: s3://…, or an absolute path on a disk that all of them mount",
        )
