"""The server's settings: what they become, and which ones are refused before anything starts."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from rich.console import Console

from pipelines.serving.deployment import application
from pipelines.serving.local import http_options, serve_here
from prag_core.config import Config, check_defaults
from prag_core.config_file import parse_config
from prag_core.errors import ConfigError


def config(**sections: dict[str, Any]) -> Config:
    return parse_config({"store": "none", "corpus": {"path": "none.jsonl"}, **sections})


def deployment(**sections: dict[str, Any]) -> Any:
    return application(config(**sections))._bound_deployment


def test_a_port_that_another_server_has_is_named() -> None:
    with socket.socket() as other:
        # As Ray Serve listens: a second listener that asks for the same is let in.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve\.port = {port}: cannot listen on 127\.0\.0\.1: .*in use"):
            serve_here(config(serve={"port": port}), print, threading.Event(), Console(quiet=True))


def test_a_replica_has_the_resources_of_the_configuration() -> None:
    plain = deployment(run={"profile": "gpu"})
    assert (plain.ray_actor_options["num_cpus"], plain.ray_actor_options["num_gpus"]) == (2, 1)
    tuned = deployment(run={"profile": "gpu", "actor_cpus": 6, "actor_gpus": 0})
    assert (tuned.ray_actor_options["num_cpus"], tuned.ray_actor_options["num_gpus"]) == (6, 0)
    assert tuned.init_args[1] == 6


def test_a_batch_has_time_for_each_of_its_questions() -> None:
    """Three rounds of questions that each take their deadline are not cut off, also not when the server ends."""
    serve = {"slots": 8, "max_batch": 10, "deadline_s": 30}
    assert http_options(config(serve=serve))["request_timeout_s"] == 3 * 30 + 10
    assert deployment(serve=serve)._deployment_config.graceful_shutdown_timeout_s == 3 * 30 + 10


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"answer": {"max_new_tokens": 300}}, r"answer\.max_new_tokens = 300.*serve\.max_tokens = 256"),
        ({"answer": {"top_k": 3}, "serve": {"max_top_k": 2}}, r"answer\.top_k = 3.*serve\.max_top_k = 2"),
    ],
)
def test_a_default_beyond_a_limit_is_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        deployment(**sections)


def test_a_templates_default_is_within_the_limit_too() -> None:
    short = config(serve={"max_tokens": 100})
    check_defaults(short, 32)
    with pytest.raises(ConfigError, match=r"answer\.max_new_tokens = 128.*serve\.max_tokens = 100"):
        check_defaults(short, 128)
    check_defaults(config(answer={"max_new_tokens": 90}, serve={"max_tokens": 100}), 90)
