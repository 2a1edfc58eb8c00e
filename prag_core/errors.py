"""Every error this project raises on purpose: each says what went wrong and what to do about it."""

from __future__ import annotations


class PragError(Exception):
    """Base of all expected errors. `message` says what happened, `remedy` what to do next.

    Instances pickle, so that a Ray worker's error reaches the driver as it was raised.
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
    """A base model cannot be found or loaded, or has not the modules that a recipe wants."""

    exit_code = 4


class StoreError(PragError):
    """The store cannot be read or written, or was made for something else."""

    exit_code = 5


class UnreachableError(StoreError):
    """The store gave no answer, or refused one: what it holds is not known, so nothing of it may count as damaged."""


class AdapterError(StoreError):
    """One adapter's bytes are missing, truncated, altered or do not fit the model."""


class ConflictError(StoreError):
    """Somebody else changed the same object first; nothing of this write is visible."""

    exit_code = 6


class RetrievalError(PragError):
    """The Lucene index or the Java machine under it cannot be used."""

    exit_code = 7


class GenerationError(PragError):
    """A generator (local model or endpoint) failed after its bounded retries."""

    exit_code = 8


class PromptTooLongError(GenerationError):
    """A prompt and the text it asks for do not fit into the model's context."""


class NotFiniteError(GenerationError):
    """The model's output for a prompt is not finite: no token can be chosen."""


class TurnsError(GenerationError):
    """The model's chat template cannot write these turns."""


class BudgetError(PragError):
    """More passages were rejected than the run's failure budget allows."""

    exit_code = 9


class LeaseError(PragError):
    """Another run holds the store's lease, or has taken it over."""

    exit_code = 10


class PreflightError(PragError):
    """Several things are wrong at once; the message names each with its remedy."""

    exit_code = 11


class ClusterError(PragError):
    """The Ray cluster cannot be reached, or refused a job."""

    exit_code = 12


class OverloadedError(PragError):
    """The service has as many requests as it takes, or is shutting down; `retry_after_s` says when to come back."""

    exit_code = 11

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, f"ask again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        return OverloadedError, (self.message, self.retry_after_s)


class DeadlineError(PragError):
    """A request was not answered before its deadline; it was dropped, and its slot is free."""

    exit_code = 12


class EngineStuckError(PragError):
    """A thread of the service has died, or makes no progress though work waits: the replica must be replaced."""

    exit_code = 13


class CanaryError(PragError):
    """A candidate snapshot answered its canary questions worse than was asked for; it was not published."""

    exit_code = 16
