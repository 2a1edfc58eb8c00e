"""An HTTP server on this machine that serves a folder by whole files: like many servers, it knows no ranges."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Handler(SimpleHTTPRequestHandler):
    """Answers 403 to paths with `forbidden` in them, and breaks off in the middle of those with `cut`.

    Of those with `encoded` it says that the packing is an encoding of the transfer, as Apache can be told to.
    """

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        if "forbidden" in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def end_headers(self) -> None:
        if "encoded" in self.path:
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        outputfile.write(data[: len(data) // 2] if "cut" in self.path else data)
        self.close_connection = "cut" in self.path

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a reader that has seen enough closes the connection."""


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder; yields its URL."""
    with _Server(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
