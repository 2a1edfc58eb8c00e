"""The page of `prag serve` in a real browser: questions, stops, errors, injected HTML, accessibility."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from pipelines.serving.api_keys import KeyFile
from prag_core.config_file import load_config
from prag_core.identity import passage_key
from prag_core.records import MODES, Passage
from tests.helpers.browser import Browser, open_browser
from tests.helpers.faulty_proxy import Fault, FaultyProxy
from tests.helpers.live import Server, publish_adapters, write_config
from tests.helpers.passages import make_passage

pytestmark = pytest.mark.slow

WAIT_S = 60
# The modes in the order of the page.
SHOWN = ("combine", "prag", "rag", "closed", "auto")
EVIL = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script></li>"""
EVIL_TITLE = f"{EVIL} Quorl 77"
EVIL_TEXT = "Quorl 77 is a hill of another kind."
PASSAGES = [
    *(make_passage(n, words=4) for n in range(6)),
    Passage(passage_key(EVIL_TITLE, EVIL_TEXT), EVIL_TITLE, EVIL_TEXT, ("p77",)),
]


@dataclass
class World:
    """A server that wants keys: `key`, and `slow_key`, which may ask once in five seconds."""

    url: str
    key: str
    slow_key: str

    def answer(self, question: str, mode: str, **settings: Any) -> dict[str, Any]:
        """What the API answers."""
        asked = {"question": question, "mode": mode, **settings}
        headers = {"Authorization": f"Bearer {self.key}"}
        response = httpx.post(f"{self.url}/v1/answer", json=asked, headers=headers, timeout=WAIT_S)
        return dict(response.raise_for_status().json())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    keys = KeyFile(folder / "keys.json")
    key, slow_key = keys.add("anna"), keys.add("bob", rate_per_minute=12)
    path = write_config(folder, tiny_model_folder, str(folder / "store"), serve={"api_keys": str(keys.path)})
    publish_adapters(load_config(path), PASSAGES, seed=0)
    with Server(path) as server:
        yield World(server.url, key, slow_key)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


class Page:
    """The page, freshly opened, as a user sees it."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        browser.complaints()
        browser.chrome.get(f"{url}/")
        self.until(lambda: self.find("#key-form").is_displayed(), "a key was asked for")

    def until(self, holds: Any, what: str) -> None:
        WebDriverWait(self.browser.chrome, WAIT_S, 0.05).until(lambda _: holds(), f"{WAIT_S} s passed before {what}")

    def find(self, selector: str) -> WebElement:
        return self.browser.chrome.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """A text as it is in the document, shown or not."""
        return str(self.find(selector).get_property("textContent"))

    def press(self, *keys: str) -> None:
        """Press keys, whatever has the focus."""
        ActionChains(self.browser.chrome).send_keys(*keys).perform()

    @property
    def focus(self) -> str:
        """The id or the label of what has the focus."""
        element = self.browser.chrome.switch_to.active_element
        return element.get_attribute("id") or element.accessible_name

    def let_in(self, key: str) -> None:
        self.find("#key").send_keys(key, Keys.ENTER)
        self.until(lambda: not self.find("#key-form").is_displayed(), "the key was taken")

    def ask(self, question: str, *modes: str) -> None:
        """Ask in these modes (default: all but `auto`) and wait until each has ended."""
        self.begin(question, *modes)
        self.until(lambda: not self.find("#stop").is_enabled(), "all had ended")

    def begin(self, question: str, *modes: str) -> None:
        if not self.find("#modes").is_displayed():
            self.find("#settings > summary").click()
        boxes = self.browser.chrome.find_elements("css selector", "#modes input")
        for box, mode in zip(boxes, SHOWN, strict=True):
            assert box.accessible_name == mode
            if box.is_selected() != (mode in (modes or MODES)):
                box.click()
        self.find("#question").clear()
        self.find("#question").send_keys(question, Keys.ENTER)

    def problem(self, mode: str) -> str:
        told = self.find(f"[aria-labelledby=mode-{mode}] .problem")
        return told.text if told.is_displayed() else ""


@pytest.fixture
def page(browser: Browser, world: World) -> Page:
    browser.show_as(1280, dark=False)
    return Page(browser, world.url)


def test_the_four_modes_side_by_side_by_keyboard_alone(page: Page, world: World) -> None:
    question = "What is Quorl 3?"
    # A key is wanted first, and the focus says so. It stays in memory.
    assert page.focus == "key"
    page.press(world.key, Keys.ENTER)
    page.until(lambda: page.focus == "question", "the question had the focus")
    stored = page.browser.run("return [document.cookie, localStorage.length, sessionStorage.length, location.href]")
    assert stored == ["", 0, 0, f"{world.url}/"]
    # Count the pieces in which an answer comes.
    page.browser.run("""
        window.pieces = 0;
        new MutationObserver((changes) => { pieces += changes.length; })
            .observe(document.querySelector("[aria-labelledby=mode-prag] .answer"), {childList: true});
    """)
    page.press(question, Keys.ENTER)
    page.until(lambda: page.text("#status").startswith("Answered from snapshot "), "all had answered")
    answers = {mode: world.answer(question, mode) for mode in MODES}
    for mode, expected in answers.items():
        column = f"[aria-labelledby=mode-{mode}]"
        assert page.text(f"{column} .answer") == expected["answer"]
        assert page.find(column).get_attribute("aria-busy") == "false"
        assert page.find(f"{column} .times").text.endswith(" s")
        shown = page.browser.chrome.find_elements("css selector", f"{column} li")
        assert [one.find_element("css selector", "bdi").get_property("textContent") for one in shown] == [
            passage["title"] for passage in expected["passages"]
        ]
        uses = {"closed": [], "rag": ["prompt"], "prag": ["weights × 1"], "combine": ["weights × 0.5", "prompt"]}[mode]
        for one, passage in zip(shown, expected["passages"], strict=True):
            text = str(one.get_property("textContent"))
            assert f"used in: {', '.join(uses)}" in text
            assert f"{passage['id']} · score {passage['score']:.2f}" in text
            assert next(made.text for made in PASSAGES if made.title == passage["title"]) in text
            assert ("adapter: trained on " in text) == ("weights" in passage["used"])
        steps = page.text(f"{column} dl")
        assert all(step in steps for step in expected["timings_ms"])
        assert expected["snapshot"] not in steps  # it is told once, for all
        assert f"{mode}: {expected['answer']}" in page.text("#spoken")
    assert f"snapshot {expected['snapshot']}." in page.text("#status")
    # The recommended mode comes first, and is the server's default.
    first = page.find("article h2")
    assert first.text == "combine"
    badges = [one for one in page.browser.chrome.find_elements("css selector", ".badge") if one.is_displayed()]
    assert len(badges) == 1
    assert badges[0].find_element("xpath", "..").get_attribute("aria-labelledby") == "mode-combine"
    # The first change empties the column and the last one sets the whole; between them come the pieces.
    assert page.browser.run("return pieces") > 4
    # Side by side: all columns begin at the same height.
    tops = {round(one.rect["y"]) for one in page.browser.chrome.find_elements("css selector", "article:not([hidden])")}
    assert len(tops) == 1
    # On with Tab: to the passages of `rag`, which Space opens.
    wanted = "[aria-labelledby=mode-rag] .passages"
    for _ in range(30):
        page.press(Keys.TAB)
        if page.browser.run(f"return document.activeElement === document.querySelector('{wanted} summary')"):
            break
    page.press(Keys.SPACE)
    page.until(lambda: page.find(f"{wanted} li").is_displayed(), "the passages were open")
    assert page.browser.complaints() == []


def test_auto_is_asked_where_it_is_chosen_and_says_why(page: Page, world: World) -> None:
    page.let_in(world.key)
    column, question = "[aria-labelledby=mode-auto]", "What is Quorl 4?"
    assert not page.find(column).is_displayed()
    page.ask(question, "auto", "closed")
    assert page.find(column).is_displayed()
    expected = world.answer(question, "auto")
    assert expected["why"].startswith(f"{expected['mode']}: ")
    assert page.text(f"{column} .answer") == expected["answer"]
    assert page.find(f"{column} .why").text == expected["why"]
    assert not page.find("[aria-labelledby=mode-closed] .why").is_displayed()
    assert page.browser.complaints() == []


def test_text_of_users_and_passages_is_never_run_as_html(page: Page, world: World) -> None:
    page.let_in(world.key)
    question = f"{EVIL} What is Quorl 77?"
    page.ask(question)
    for mode in ("rag", "prag", "combine"):
        assert page.text(f"[aria-labelledby=mode-{mode}] li bdi") == EVIL_TITLE
        answer = world.answer(question, mode)["answer"] or "(an empty answer)"
        assert page.text(f"[aria-labelledby=mode-{mode}] .answer") == answer
    assert page.browser.run("return document.querySelectorAll('img, script:not([src])').length") == 0
    assert page.browser.chrome.title == "Parametric RAG"
    assert page.browser.complaints() == []
    # Even if some code did insert it as markup, or call elsewhere, the page's policy would not let it.
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        page.browser.run(f"document.body.innerHTML = `{EVIL}`")
    broken = page.browser.run("""
        const broken = new Promise((resolve) => document.addEventListener("securitypolicyviolation", resolve));
        fetch("http://127.0.0.1:1/").catch(() => {});
        return (await broken).effectiveDirective;
    """)
    assert broken == "connect-src"


def test_a_refused_user_sees_what_to_do(page: Page, world: World) -> None:
    # A wrong key leaves the form, and asks again.
    page.find("#key").send_keys("prag_wrong_key", Keys.ENTER)
    page.until(lambda: page.text("#status") == "The server does not accept this key.", "the key was refused")
    assert page.focus == "key"
    # A question that was asked without a key is asked again once there is one.
    page.ask("What is Quorl 1?", "closed")
    assert page.problem("closed") == "The server does not accept this key."
    page.let_in(world.slow_key)
    page.until(lambda: page.text("#status").startswith("Answered from snapshot "), "it was answered")
    # This key may ask once in five seconds, twice at once.
    page.ask("What is Quorl 1?")
    refused = [mode for mode in SHOWN if page.problem(mode)]
    assert refused
    assert page.text("#status") == f"Not answered: {', '.join(refused)}."
    assert "this key asks more often than it may. Try again in " in page.problem(refused[0])
    button = page.find(f"[aria-labelledby=mode-{refused[0]}] button")
    assert (button.accessible_name, button.is_enabled()) == (f"Ask again: {refused[0]}", False)
    page.until(button.is_enabled, "it may be asked again")
    button.click()
    page.until(lambda: page.text(f"[aria-labelledby=mode-{refused[0]}] .answer") != "", "it was answered")
    assert not page.problem(refused[0])
    # A reload forgets the key.
    page.browser.chrome.refresh()
    page.until(lambda: page.find("#key-form").is_displayed(), "a reload forgot the key")


def test_connection_faults_are_shown_and_asking_again_works(browser: Browser, world: World) -> None:
    question, column = "What is Quorl 2?", "[aria-labelledby=mode-prag]"
    expected = world.answer(question, "prag")["answer"]
    with FaultyProxy(world.url) as proxy:
        page = Page(browser, proxy.endpoint)
        page.let_in(world.key)
        for fault, told in (
            (Fault("503", methods=("POST",)), "The server answered with status 503."),
            (Fault("reset", methods=("POST",)), "The server cannot be reached."),
            (Fault("truncated", methods=("POST",)), "The connection broke before the answer was complete."),
        ):
            proxy.fail(fault)
            page.ask(question, "prag")
            assert page.problem("prag") == told
            assert page.text("#status") == "Not answered: prag."
            assert expected.startswith(page.text(f"{column} .answer"))
            proxy.fail()
            page.find(f"{column} button").click()
            page.until(lambda: page.text("#status").startswith("Answered from snapshot "), "it was answered at last")
            assert page.text(f"{column} .answer") == expected
            assert not page.problem("prag")
        # Stopped, and asked again, one of them and all of them.
        for stop in (f"{column} button", "#stop"):
            proxy.fail(Fault("late", methods=("POST",), times=1))
            page.begin(question, "prag")
            page.until(lambda: page.find(column).get_attribute("aria-busy") == "true", "it was under way")
            page.find(stop).click()
            page.until(lambda: page.problem("prag") == "Stopped.", "it was stopped")
            assert page.find(f"{column} button").accessible_name == "Ask again: prag"
        page.ask(question)
        assert page.text("#status").startswith("Answered from snapshot ")


def test_it_is_accessible_at_every_width_and_uses_only_its_server(
    page: Page, browser: Browser, world: World, tmp_path: Path
) -> None:
    for state in ("before", "after"):
        if state == "after":
            page = Page(browser, world.url)
            page.let_in(world.key)
            page.find("#settings > summary").click()
            page.find("#max-tokens").send_keys("200")
            page.ask("What is Quorl 77?")
            browser.run("for (const one of document.querySelectorAll('article details')) one.open = true;")
        for width in (1280, 375, 360):
            for dark in (False, True):
                browser.show_as(width, dark)
                browser.screenshot(tmp_path / f"{state}-{width}-{'dark' if dark else 'light'}.png")
                assert browser.barriers() == []
                assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert browser.hosts_asked() == {"127.0.0.1"}


def test_the_documentation_of_the_api_works_offline(browser: Browser, world: World) -> None:
    browser.show_as(1280, dark=False)
    browser.complaints()
    browser.hosts_asked()
    browser.chrome.get(f"{world.url}/docs")
    shown = WebDriverWait(browser.chrome, WAIT_S).until(
        lambda chrome: chrome.find_elements("css selector", ".opblock-summary-path")
    )
    paths = {str(one.get_property("textContent")).replace("\u200b", "") for one in shown}
    assert {"/v1/answer", "/v1/batch", "/v1/about", "/v1/chat/completions", "/healthz", "/metrics"} <= paths
    assert browser.complaints() == []
    assert browser.hosts_asked() == {"127.0.0.1"}
