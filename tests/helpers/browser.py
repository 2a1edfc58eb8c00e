"""A real Chromium for the tests of the page, and everything that it asked the network for."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service as ChromeDriver

REMEDY = "Chromium and its driver are missing: as root `make browser`, or install chromium and chromium-driver"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--no-default-browser-check", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--lang=en",
    # The browser asks its makers for this and that of its own accord: no name but ours is looked up.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def _programs() -> tuple[str, str]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    if os.environ.get("CI"):
        pytest.fail(REMEDY)
    pytest.skip(REMEDY)


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`; without one the test is skipped, and fails in CI."""
    browser, driver = _programs()
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=ChromeDriver(driver))
    chrome.set_script_timeout(60)
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


class Browser:
    """What the tests do with a page."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript and return what it returns; it may await.

        Raises:
            RuntimeError: with what it threw.
        """
        wrapped = f"""
            const done = arguments[arguments.length - 1];
            const work = async () => {{ {script} }};
            work().then((value) => done({{value}}), (error) => done({{error: String(error)}}));
        """
        ended = self.chrome.execute_async_script(wrapped, *arguments)
        if "error" in ended:
            raise RuntimeError(ended["error"])
        return ended.get("value")

    def show_as(self, width: int, dark: bool) -> None:
        """Show the page at a width in CSS pixels, in the light or the dark."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def screenshot(self, file: Path) -> None:
        """Save the whole page as a PNG."""
        shot = self.chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(shot["data"]))

    def barriers(self) -> list[str]:
        """What keeps people out of the page, by axe's rules: WCAG 2.1 AA and good practice."""
        if not self.run("return Boolean(window.axe)"):
            source = (resources.files("axe_core_python") / "axe.min.js").read_text()
            self.chrome.execute_script(source)
        found = self.run("return (await axe.run()).violations")
        return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]

    def complaints(self) -> list[str]:
        """What the console says since the last call: breaches of the policy, uncaught errors (not: an HTTP status)."""
        return [entry["message"] for entry in self.chrome.get_log("browser") if entry["source"] != "network"]

    def hosts_asked(self) -> set[str]:
        """The hosts of all requests to a network that pages made since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(params["request"]["url"]) for params in sent]
        return {str(url.hostname) for url in urls if url.scheme not in ("data", "blob", "about", "chrome")}
