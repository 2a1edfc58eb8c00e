"""`prag serve`: answers over HTTP."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from pipelines.cli import options
from pipelines.cli.stopping import stop_of
from pipelines.cli.terminal import out, progress_to, result_only
from pipelines.execution.spinner import spinner
from prag_core.config import Config

app = typer.Typer()


@app.command(rich_help_panel=options.ASK, epilog="Example: `prag serve -c config.yaml --port 8000`")
def serve(
    config: options.Config = options.EXAMPLE,
    host: Annotated[str | None, typer.Option(help="The address to listen on; default: serve.host.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port; default: serve.port.")] = None,
    set_: options.Set = None,
    *,
    context: typer.Context,
) -> None:
    """Answer questions over HTTP until interrupted: the same answers as `prag ask`, for many users at once.

    When it is interrupted, requests under way are still answered. An address that other machines reach needs
    `serve.api_keys`; see `prag keys`.
    """
    settings = options.settings_of(config, set_, {"serve.host": host, "serve.port": port})
    with spinner(progress_to, "starting"):
        from pipelines.serving.local import serve_here  # takes seconds: a wrong setting is reported before

    stop = stop_of(context)

    def show_welcome(url: str) -> None:
        # From now on a signal lets it answer the requests under way.
        stop.awaited = True
        stop.remedy = f"The requests under way were answered. {stop.remedy}"
        out.print(_welcome(settings, url), highlight=False, markup=False, soft_wrap=True)

    with result_only(tell=True):
        serve_here(settings, show_welcome, stop.noted, progress_to)


def _welcome(config: Config, url: str) -> str:
    key = "" if config.serve.api_keys is None else ' -H "Authorization: Bearer $PRAG_KEY"'
    question = next(iter(config.serve.example_questions), "Who …?")
    body = json.dumps({"question": question, "mode": config.answer.mode}, ensure_ascii=False)
    return (
        f"Serving at {url} (a page for browsers; Ctrl+C ends it). OpenAI clients: base_url={url}/v1\n"
        f"  curl {url}/v1/answer{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
