"""The life of a vLLM server: started, asked, found dead, ended. A script that speaks its protocol stands in for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prag_core.config import ModelConfig
from prag_core.errors import ConfigError, ModelError
from prag_core.llm.generator import Prompt
from prag_core.llm.model_facts import model_fingerprint
from prag_core.llm.vllm_generator import VllmGenerator
from tests.helpers.generators import replies

# vLLM cannot be installed beside the project, whose versions of torch and transformers it does not accept.
SERVER = f"""#!{sys.executable} -I
import http.server, json, os, sys
assert sys.argv[1] == "serve"
if "--fail" in sys.argv:
    sys.exit("ValueError: no room for the weights")
port = int(sys.argv[sys.argv.index("--port") + 1])

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer(200, {{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
            return self.answer(401, {{}})
        text = body["messages"][0]["content"]
        if text == "die":
            print("RuntimeError: out of everything", file=sys.stderr, flush=True)
            os._exit(3)
        said = text.upper() + str("PYTHONPATH" in os.environ) + (" seed" if "seed" in body else "")
        says = {{"role": "assistant", "content": said}}
        self.answer(200, {{"choices": [{{"index": 0, "finish_reason": "stop", "message": says}}]}})

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    path = tmp_path / "vllm"
    path.write_text(SERVER)
    path.chmod(0o755)
    return str(path)


def test_a_server_is_started_asked_and_found_dead(command: str, tiny_model_folder: Path) -> None:
    generator = VllmGenerator(command, ModelConfig(name=str(tiny_model_folder)), concurrency=4)
    assert generator.fingerprint == model_fingerprint(tiny_model_folder)
    sampled = {"max_new_tokens": 4, "temperature": 1.0}
    assert replies(generator, [Prompt("a"), Prompt("b")], **sampled) == ["AFalse seed", "BFalse seed"]
    with pytest.raises(RuntimeError, match="vLLM has ended: RuntimeError: out of everything"):
        replies(generator, [Prompt("die")], max_new_tokens=4)


def test_vllm_gets_no_seed_where_one_ends_it(command: str, tiny_model_folder: Path) -> None:
    generator = VllmGenerator(command, ModelConfig(name=str(tiny_model_folder)), concurrency=4, send_seed=False)
    assert replies(generator, [Prompt("a")], max_new_tokens=4, temperature=1.0) == ["AFalse"]


def test_a_missing_command_says_how_to_install_it(tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"augment\.vllm = 'no-such-vllm'") as caught:
        VllmGenerator("no-such-vllm", ModelConfig(name=str(tiny_model_folder)))
    assert "pip install vllm" in str(caught.value)


def test_a_server_that_does_not_start_says_why(command: str, tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match="ended with code 1 as it started: ValueError: no room for the weights"):
        VllmGenerator(f"{command} --fail", ModelConfig(name=str(tiny_model_folder)))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own signal")
def test_the_server_ends_with_a_process_that_is_killed(command: str, tiny_model_folder: Path) -> None:
    script = (
        "import time; from prag_core.config import ModelConfig; from prag_core.llm.vllm_generator import VllmGenerator;"
        f"VllmGenerator({command!r}, ModelConfig(name={str(tiny_model_folder)!r})); print('up', flush=True);"
        "time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    (server,) = psutil.Process(owner.pid).children()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server outlives its owner"
        time.sleep(0.05)
