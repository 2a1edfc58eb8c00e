"""The command that answers over HTTP: `prag serve`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipelines.cli.terminal import DEFAULT_CONFIG, ConfigOption, SetOption, out, result_only
from prag_core.config import Config
from prag_core.config_file import load_config


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(serve)


def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Where to listen; default: serve.host.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="On which port; default: serve.port.")] = None,
    set_: SetOption = None,
) -> None:
    """Answer questions over HTTP until interrupted: the same answers as `prag ask`, for many users at once.

    What is under way when it ends is still answered. An address that other machines reach needs `serve.api_keys`; see
    `prag keys`.
    """
    overrides = list(set_ or [])
    overrides += [f"serve.{name}={value}" for name, value in (("host", host), ("port", port)) if value]
    settings = load_config(config, overrides)

    from pipelines.serving.local import serve_here  # seconds of imports

    with result_only():
        serve_here(
            settings, lambda url: out.print(_welcome(settings, url), highlight=False, markup=False, soft_wrap=True)
        )


def _welcome(config: Config, url: str) -> str:
    key = "" if config.serve.api_keys is None else ' -H "Authorization: Bearer $PRAG_KEY"'
    body = json.dumps({"question": "Who built the Cazambra Lighthouse?", "mode": config.answer.mode})
    return (
        f"Serving at {url} (a page for browsers; Ctrl+C ends it). OpenAI clients: base_url={url}/v1\n"
        f"  curl {url}/v1/answer{key} -H 'Content-Type: application/json' -d '{body}'"
    )
