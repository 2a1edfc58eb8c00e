"""Files inside installed Python packages, such as the example corpus: `package://PACKAGE/FILE`."""

from __future__ import annotations

from importlib import resources

_SCHEME = "package://"


def local_path(path: str) -> str:
    """Return where a file `package://PACKAGE/FILE` is on this machine; return any other path unchanged.

    Each process asks for itself, because a package may be in another folder on another node.

    Raises:
        FileNotFoundError: when this machine does not have the package.
    """
    if not path.startswith(_SCHEME):
        return path
    package, _, file = path.removeprefix(_SCHEME).partition("/")
    try:
        return str(resources.files(package) / file)
    except (ModuleNotFoundError, TypeError, ValueError):  # TypeError: a module is no package
        raise FileNotFoundError(f"{path}: there is no Python package {package!r}") from None
