"""What an evaluation shows, in sentences. Each claim rests on a difference of F1 and its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What must not explain a mode's answers: the columns that it is compared with, and what they are.
_CONTROLS = {
    "wrong": "another passage's adapter",
    "random": "random factors of the same size",
    "task": "an adapter trained on other passages",
    "task_rag": "an adapter trained on other passages, with the same prompt",
    "wrong_rag": "another passage's adapter, with the same prompt",
    "reader_rag": "the reader alone, with the same prompt",
    "da_rag": "the augmentations in the prompt",
}


@dataclass(frozen=True)
class Conclusion:
    """A sentence about a claim; `holds` is None where neither the claim nor its opposite is shown."""

    holds: bool | None
    text: str


def conclusions(report: Mapping[str, Any]) -> list[Conclusion]:
    """Return what a report of `summarize` shows, the most important first."""
    found = {(d["left"], d["right"]): d for d in report["differences"] if d["metric"] == "f1"}
    said = []
    if ("prag", "closed") in found:
        said.append(_weights(found))
    if ("combine", "rag") in found:
        said.append(_combine(found))
    if "auto" in report:
        said.append(auto_conclusion(report["auto"]))
    columns = report["columns"]
    for name, column in columns.items():
        if column["failed"]:
            said.append(Conclusion(False, f"{column['failed']} answers of {name} failed and count as wrong."))
    without = sum(column["without_adapter"] for name, column in columns.items() if name in ("prag", "combine"))
    if without:
        answers = f"{without} answer{'' if without == 1 else 's'}"
        text = f"{answers} had a passage without an adapter, which was read from the prompt instead."
        said.append(Conclusion(None, text))
    recall = report["retrieval"]["any"]
    if recall:
        k = str(report["plan"]["top_k"][0])
        said.append(Conclusion(None, f"A gold passage is among the first {k} for {recall[k]:.0%} of the questions."))
    return said


def auto_conclusion(fit: Mapping[str, Any]) -> Conclusion:
    """Return what a fit of `auto` shows, from the report: whether it is as good as the best mode, and fast enough."""
    mean, low, high = fit["difference"]
    share, most = fit["auto"]["time_share"], fit["most_time_share"]
    gain = _change({"mean": mean, "low": low, "high": high})
    text = (
        f"auto, cross-validated, is {gain} {fit['best']}, the best single mode, and takes {share:.0%} of combine's time"
    )
    if share > most:
        return Conclusion(False, f"{text}, more than the {most:.0%} that it may.")
    if high < 0:
        return Conclusion(False, f"{text}: it is worse.")
    if low < 0:
        return Conclusion(None, f"{text}: that it is as good is not shown.")
    return Conclusion(True, f"{text}.")


def _weights(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> Conclusion:
    over = found["prag", "closed"]
    gain = f"prag is {_change(over)} the bare model"
    if over["high"] < 0:
        return Conclusion(False, f"The adapters make answers worse: {gain}.")
    if over["low"] <= 0:
        return Conclusion(None, f"It is not shown that the weights hold knowledge: {gain}.")
    controls = [name for name in _CONTROLS if ("prag", name) in found]
    if not controls:
        return Conclusion(True, f"The adapters improve answers: {gain}. No control was asked, so it may be form alone.")
    weakest = min(controls, key=lambda name: float(found["prag", name]["low"]))
    against = f"{_change(found['prag', weakest])} {_CONTROLS[weakest]}"
    if found["prag", weakest]["low"] <= 0:
        return Conclusion(
            None, f"Adapters improve answers, but that they know their passage is not shown: {gain}, {against}."
        )
    return Conclusion(True, f"The weights hold knowledge: {gain}, and {against}.")


def _combine(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> Conclusion:
    over = found["combine", "rag"]
    gain = f"combine is {_change(over)} rag"
    if over["high"] < 0:
        return Conclusion(False, f"With the passages in the prompt, the adapters harm: {gain}.")
    if over["low"] <= 0:
        return Conclusion(None, f"With the passages in the prompt, the adapters are not shown to help: {gain}.")
    controls = [name for name in _CONTROLS if ("combine", name) in found]
    open_ = [name for name in controls if found["combine", name]["low"] <= 0]
    text = f"With the passages in the prompt, the adapters help: {gain}"
    if not open_:
        return Conclusion(True, f"{text}{', and above each control' if controls else ''}.")
    least = min(open_, key=lambda name: float(found["combine", name]["mean"]))
    return Conclusion(
        None, f"{text}. It is not shown to be better than {_CONTROLS[least]}: {_change(found['combine', least])} it."
    )


def _change(difference: Mapping[str, Any]) -> str:
    side = "over" if difference["mean"] >= 0 else "under"
    return f"{abs(difference['mean']):.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}] {side}"
