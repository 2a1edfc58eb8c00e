"""A Generator that starts a vLLM server of its own, and asks it.

vLLM demands other versions of torch and transformers than this project, so it lives in an environment of its own, of
which only the command is known here.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO

import httpx

from prag_core.config import EndpointConfig, ModelConfig
from prag_core.errors import ConfigError, GenerationError, ModelError
from prag_core.llm.checkpoint import resolve_model
from prag_core.llm.generator import Prompt
from prag_core.llm.model_facts import model_fingerprint
from prag_core.llm.openai_generator import OpenAIGenerator

log = logging.getLogger(__name__)

DEFAULT_REQUESTS = 256
# Large models are read and compiled within it.
_START_S = 1800.0
_REPLY_S = 600.0
_LOGGED_LINES = 60
_SET_PARENT_DEATH_SIGNAL = 1
_INSTALL = (
    "install vLLM in an environment of its own on each node (python -m venv /opt/vllm && /opt/vllm/bin/pip install "
    "vllm), and set augment.vllm to its command, /opt/vllm/bin/vllm"
)


class VllmGenerator:
    """A model in a vLLM server of this process's own, on its GPUs. The server ends with the process.

    `url` and `key` are where the server speaks the OpenAI protocol, and the key that it demands.

    Args:
        command: The command of vLLM, and further arguments of `vllm serve`.
        model: The model; its weights give the fingerprint.
        concurrency: The most requests in flight, all of which vLLM runs at the same time.
        send_seed: Send each request's seed. vLLM's builds for processors end at the first one.
        on_progress: Called after each reply, and while the server starts.

    Raises:
        ConfigError: when there is no such command.
        ModelError: when the model cannot be found, or the server does not start.
    """

    def __init__(
        self,
        command: str,
        model: ModelConfig,
        *,
        concurrency: int = DEFAULT_REQUESTS,
        send_seed: bool = True,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        program, *further = shlex.split(command) or [""]
        found = shutil.which(program)
        if found is None:
            raise ConfigError(f"augment.vllm = {command!r}: there is no such command on this machine", _INSTALL)
        folder = resolve_model(model.name)
        self.fingerprint = model_fingerprint(folder)
        self.concurrency = concurrency
        port, self.key = _free_port(), secrets.token_hex()
        self.url = f"http://127.0.0.1:{port}/v1"
        arguments = ["serve", str(folder), "--served-model-name", model.name, "--dtype", model.dtype]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(concurrency)]
        arguments += ["--disable-uvicorn-access-log", *further]
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (it lives as long as the server)
        self._server = _start([found, *arguments], self.key, self._output)
        try:
            self._wait(f"http://127.0.0.1:{port}/health", on_progress)
        except BaseException:
            self._server.kill()
            raise
        endpoint = EndpointConfig(url=self.url, model=model.name, timeout_s=_REPLY_S, retries=1, send_seed=send_seed)
        self._endpoint = OpenAIGenerator(endpoint, key=self.key, concurrency=concurrency, on_progress=on_progress)

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        """Return the text that continues a prompt, or its error; see `Generator`.

        Raises:
            RuntimeError: when the server has ended. A new generator starts a new one.
        """
        try:
            return await self._endpoint.ask(
                prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
            )
        except GenerationError:  # its port is closed, perhaps before its process has ended
            raise RuntimeError(f"vLLM has ended: {self._last_errors()}") from None

    async def close(self) -> None:
        """Close the connections; the server runs on."""
        await self._endpoint.close()

    def stop(self) -> None:
        """End the server."""
        self._server.terminate()
        self._server.wait()

    def _wait(self, url: str, on_progress: Callable[[], None]) -> None:
        """Wait until the server is ready."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                break
            try:
                if httpx.get(url, timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            on_progress()
            time.sleep(0.5)
        ended = f"ended with code {self._server.returncode}" if self._server.poll() is not None else "is not ready"
        raise ModelError(
            f"vLLM {ended} as it started: {self._last_errors()}",
            "read the worker's log; arguments of `vllm serve` may follow the command in augment.vllm",
        )

    def _last_errors(self) -> str:
        """Return the last lines of the server's output that name an error, and log its end."""
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        log.error("vLLM wrote at its end:\n%s", "\n".join(lines[-_LOGGED_LINES:]))
        return " | ".join([line.strip() for line in lines if "rror" in line][-3:])[:1000] or "it names no error"


def _start(command: list[str], key: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
    # The modules of this environment are not those of vLLM's.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)

    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end_with_parent
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
