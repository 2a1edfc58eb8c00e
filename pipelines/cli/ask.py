"""`prag ask`: one question, answered on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from pipelines.cli import options
from pipelines.cli.terminal import out, print_json, print_table, result_only
from prag_core.config import Config
from prag_core.inference.question import check_question
from prag_core.records import MODES, Answer, Mode, UsedPassage

app = typer.Typer()


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    config: options.Config = options.EXAMPLE,
    mode: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODES)}; default: answer.mode.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=20, help="Passages to retrieve.")] = None,
    weights: Annotated[str | None, typer.Option(help="How to add the adapters: sum, mean or score.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer in all four modes side by side.")] = False,
    snapshot: options.Snapshot = None,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Answer a question from the snapshot in service.

    `closed` is the bare model, `rag` has the passages in the prompt, `prag` has them in the weights, `combine` both.
    """
    given = {"answer.mode": mode, "answer.weights": weights, "answer.top_k": top_k}
    settings = options.settings_of(config, set_, given)
    check_question(question, settings.serve.max_question_chars)
    chosen = options.snapshot_of(settings, snapshot)
    with result_only():
        answers = _answers(settings, question, MODES if compare else (settings.answer.mode,), chosen)
    if as_json:
        print_json([asdict(answer) for answer in answers])
    else:
        _show_answers(answers)


def _answers(config: Config, question: str, modes: Sequence[Mode], snapshot: str | None) -> list[Answer]:
    from prag_core.inference.engine import open_engine
    from prag_core.inference.request import Request
    from prag_core.store.objects import open_store

    engine = open_engine(open_store(config), config, snapshot)
    top_k, weights = config.answer.top_k, config.answer.weights
    return [engine.answer(Request(question, mode, top_k, weights)) for mode in modes]


def _show_answers(answers: Sequence[Answer]) -> None:
    for answer in answers:
        out.print(Text.assemble((f"{answer.mode:>8}", "bold"), f"  {answer.text}"))
        if answer.reasoning:
            out.print(f"          reasoning: {answer.reasoning}", highlight=False)
        steps = ", ".join(f"{step} {ms:.0f}" for step, ms in answer.milliseconds.items())
        out.print(f"          {steps} ms; {answer.prompt_tokens} prompt tokens, {answer.new_tokens} new")
    uses: dict[str, list[str]] = {}
    for answer in answers:
        for passage in answer.passages:
            uses.setdefault(passage.key, []).append(f"{answer.mode}: {_use(passage)}")
    rows = [
        (f"{p.score:.2f}", p.title, ", ".join(p.sources), "\n".join(uses[p.key]))
        for p in max((answer.passages for answer in answers), key=len)
    ]
    if rows:
        print_table("Retrieved passages", rows, ("score", "title", "ids", "how it was used"))


def _use(passage: UsedPassage) -> str:
    places = [name for name, used in (("weights", passage.in_weights), ("prompt", passage.in_prompt)) if used]
    note = f" ({passage.note})" if passage.note else ""
    return " and ".join(places) + note
