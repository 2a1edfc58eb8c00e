"""`prag ask`: one question, answered on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import shorten
from typing import Annotated

import typer
from rich.text import Text

from pipelines.cli import options
from pipelines.cli.terminal import out, print_json, progress_to, result_only
from pipelines.execution.spinner import spinner
from pipelines.words import counted, duration
from prag_core.config import Config
from prag_core.inference.question import check_question
from prag_core.records import ASKED_MODES, Answer, AskedMode, MergeRule, Mode, UsedPassage

app = typer.Typer()


# `prag ask --compare` shows the configured mode first, then the others in this order.
_COMPARED: tuple[Mode, ...] = ("combine", "prag", "rag", "closed")
# Of a passage, unless its whole text is wanted.
_SHOWN_CHARS = 200


@app.command(rich_help_panel=options.ASK, epilog='Example: `prag ask -c config.yaml --compare "Who built it?"`')
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    config: options.Config = options.EXAMPLE,
    mode: Annotated[
        AskedMode | None, typer.Option(help=f"One of {', '.join(ASKED_MODES)}; default: answer.mode.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=20, help="Passages to retrieve.")] = None,
    weights: Annotated[MergeRule | None, typer.Option(help="How to add the adapters: sum, mean or score.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer in all four modes, one below the other.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Show the whole texts of the passages.")] = False,
    snapshot: options.Snapshot = None,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Answer a question from the snapshot in service, and show the passages it rests on.

    `combine` has the passages in the weights and in the prompt, `prag` in the weights alone, `rag` in the prompt alone;
    `closed` is the bare model. `auto` chooses one of these by what it finds, and says why.
    """
    given = {"answer.mode": mode, "answer.weights": weights, "answer.top_k": top_k}
    settings = options.settings_of(config, set_, given)
    check_question(question, settings.serve.max_question_chars)
    chosen = options.snapshot_of(settings, snapshot)
    first = settings.answer.mode
    modes = (first, *(other for other in _COMPARED if other != first)) if compare else (first,)
    with result_only(), spinner(progress_to, "loading the model and answering"):
        answers = _answers(settings, question, modes, chosen)
    if as_json:
        print_json([asdict(answer) for answer in answers])
    else:
        _show_answers(answers, whole=text)


def _answers(config: Config, question: str, modes: Sequence[AskedMode], snapshot: str | None) -> list[Answer]:
    from prag_core.inference.engine import open_engine
    from prag_core.inference.request import Request
    from prag_core.store.objects import open_store

    engine = open_engine(open_store(config), config, snapshot)
    top_k, weights = config.answer.top_k, config.answer.weights
    answers: list[Answer] = []
    for mode in modes:
        # What `auto` has chosen is not asked again.
        if mode not in {answer.mode for answer in answers}:
            answers.append(engine.answer(Request(question, mode, top_k, weights)))
    return answers


def _show_answers(answers: Sequence[Answer], *, whole: bool = False) -> None:
    for answer in answers:
        out.print(Text.assemble((f"{answer.mode:>8}", "bold"), f"  {answer.text or '(empty)'}"))
        if answer.reasoning:
            out.print(f"          reasoning: {answer.reasoning}", highlight=False)
        if answer.why:
            out.print(f"          auto chose {answer.why}", style="dim", highlight=False)
        steps = ", ".join(f"{step} {ms / 1e3:.2f}" for step, ms in answer.milliseconds.items() if ms >= 5)
        spent = duration(sum(answer.milliseconds.values()) / 1e3) + (f" ({steps})" if steps else "")
        tokens = f"{counted(answer.prompt_tokens, 'prompt token')}, {answer.new_tokens:,} new"
        out.print(f"          {spent}; {tokens}", style="dim", highlight=False)
    if all(not answer.passages for answer in answers) and any(answer.mode != "closed" for answer in answers):
        out.print("\nNo passage shares a word with the question: this is what the bare model says.")
    uses: dict[str, list[str]] = {}
    for answer in answers:
        for passage in answer.passages:
            uses.setdefault(passage.key, []).append(f"{answer.mode}: {_use(passage)}")
    for passage in max((answer.passages for answer in answers), key=len):
        about = f"  ({', '.join(passage.sources)}; BM25 score {passage.score:.2f})"
        out.print(Text.assemble("\n", (passage.title or passage.key, "bold"), about))
        out.print(passage.text if whole else shorten(passage.text, _SHOWN_CHARS, placeholder=" …"), highlight=False)
        out.print("; ".join(uses[passage.key]), style="dim", highlight=False)


def _use(passage: UsedPassage) -> str:
    places = [name for name, used in (("weights", passage.in_weights), ("prompt", passage.in_prompt)) if used]
    note = f" ({passage.note})" if passage.note else ""
    return " and ".join(places) + note
