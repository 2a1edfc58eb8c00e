"""The errors that this project raises on purpose. Each says what went wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

# What the command line's exit codes mean. An error class that sets no `exit_code` has that of its base class.
# A signal ends a command with 128 and its number, as shells count.
EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "failed",
    2: "wrong configuration or usage",
    3: "bad input",
    4: "base model",
    5: "store (unreachable, or damaged)",
    6: "somebody else changed the store first",
    7: "retrieval or Java",
    8: "generator",
    9: "too many rejects",
    10: "another run works on the store",
    11: "several things are wrong",
    12: "the cluster",
    13: "the service is stuck",
    14: "the service is overloaded",
    15: "a request missed its deadline",
    16: "the canary",
    129: "stopped by SIGHUP (the terminal was closed)",
    130: "stopped by SIGINT (Ctrl+C)",
    143: "stopped by SIGTERM",
}


# What to do about anything that is damaged. Without `--full` the check finds what is missing, but nothing altered.
REPAIR = "run `prag verify --full` to see what is damaged, then `prag repair`"


class PragError(Exception):
    """Base class of all expected errors. `message` says what happened, `remedy` what to do next.

    Instances can be pickled, so a Ray worker's error reaches the driver unchanged.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


class ConfigError(PragError):
    """A configuration file, key, value or recipe name is wrong."""

    exit_code = 2


class InputError(PragError):
    """An input file is missing, empty, unreadable or lacks what its format requires."""

    exit_code = 3


class ModelError(PragError):
    """A base model cannot be found or loaded, or lacks the modules that a recipe adapts."""

    exit_code = 4


class StoreError(PragError):
    """The store cannot be read or written, or was made for something else."""

    exit_code = 5


class UnreachableError(StoreError):
    """The store did not answer, or denied access. So nothing is known about its objects: none may count as damaged."""


class DamagedError(StoreError):
    """The store has answered: an object is missing, altered, cut short, or not what it should be."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy or REPAIR)


class AdapterError(StoreError):
    """One adapter's bytes are missing, truncated, altered or do not fit the model."""


class NotFiniteAdapterError(AdapterError):
    """One adapter holds values that are not finite."""


class ConflictError(StoreError):
    """Somebody else changed the same object first; this write has changed nothing."""

    exit_code = 6


class RetrievalError(PragError):
    """The index cannot be used, or the Java virtual machine that Lucene runs on."""

    exit_code = 7


class GenerationError(PragError):
    """A generator (local model or endpoint) failed after its bounded retries."""

    exit_code = 8


class PromptTooLongError(GenerationError):
    """A prompt and the tokens to generate do not fit into the model's context."""


class UnfinishedReplyError(GenerationError):
    """A model was still reasoning when its reply had to end, so it has said nothing yet."""


class NotFiniteError(GenerationError):
    """The model's output for a prompt is not finite, so no token can be chosen."""


class TurnsError(GenerationError):
    """The model's chat template does not accept these turns."""


class BudgetError(PragError):
    """More passages were rejected than the run's failure budget allows."""

    exit_code = 9


class LeaseError(PragError):
    """Another run holds the store's lease, or has taken it over."""

    exit_code = 10


class PreflightError(PragError):
    """Several things are wrong at the same time. The message names each with its remedy."""

    exit_code = 11


class ClusterError(PragError):
    """The Ray cluster cannot be reached, or refused a job."""

    exit_code = 12


class OverloadedError(PragError):
    """The service cannot take another request now, or is shutting down. `retry_after_s`: when to try again."""

    exit_code = 14

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, f"ask again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        return OverloadedError, (self.message, self.retry_after_s)


class DeadlineError(PragError):
    """A request was not answered before its deadline. It was dropped, and its slot is free."""

    exit_code = 15


class EngineStuckError(PragError):
    """A thread of the service has died, or makes no progress while work waits. The replica must be replaced."""

    exit_code = 13


class CanaryError(PragError):
    """A candidate snapshot answered the canary questions worse than required, so it was not published."""

    exit_code = 16
