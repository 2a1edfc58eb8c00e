"""The replies and task adapters that evaluations store."""

from __future__ import annotations

import safetensors.torch

from prag_core.config import Config
from prag_core.errors import AdapterError, StoreError
from prag_core.evaluation.plan import EVALUATION_VERSION, EvaluationReply
from prag_core.identity import fingerprint
from prag_core.llm.layout import LoraLayout
from prag_core.llm.lora import Factors, check_factors
from prag_core.records import from_table
from prag_core.store.objects import Store
from prag_core.store.snapshot import Snapshot, answers_of


def evaluation_folder(config: Config, store: Store, snapshot: Snapshot) -> str:
    """Return the folder of all replies that a snapshot's adapters give; write its `about.json` if it is new.

    Evaluations of snapshots with the same base model, recipe, adapters and forgotten passages share it. `prag gc`
    removes it with the last of these snapshots.
    """
    settings = {"version": EVALUATION_VERSION, "max_new_tokens": config.answer.max_new_tokens}
    about = {**settings, "answers_of": answers_of(snapshot)}
    folder = f"evaluations/{fingerprint(about)}"
    if not store.exists(f"{folder}/about.json"):
        store.put_json(f"{folder}/about.json", about)
    return folder


def task_adapter_name(folder: str, name: str) -> str:
    """Return the name of the object that holds a task adapter."""
    return f"{folder}/tasks/{name}.safetensors"


def read_task_adapter(store: Store, folder: str, layout: LoraLayout, name: str) -> Factors:
    """Return the factors of a stored task adapter.

    Raises:
        AdapterError: when it is missing, damaged, or of another shape.
    """
    try:
        tensors = safetensors.torch.load(store.get(task_adapter_name(folder, name)))
    except (StoreError, safetensors.SafetensorError) as error:
        raise AdapterError(f"task adapter {name}: {error}", "remove it and evaluate again") from None
    factors = {key.removeprefix("task/"): tensor for key, tensor in tensors.items()}
    check_factors(layout, factors, name)
    return factors


def stored_replies(store: Store, folder: str) -> dict[str, EvaluationReply]:
    """Return all stored replies of an evaluation folder, by the request's id; an answer comes before a failure."""
    parts = store.list(f"{folder}/replies", ".parquet")
    rows = from_table(EvaluationReply, store.get_table(EvaluationReply, parts))
    return {reply.id: reply for reply in sorted(rows, key=lambda reply: not reply.failed)}
