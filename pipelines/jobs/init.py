"""The first step with a corpus of one's own: look at it, and write a short configuration for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.preflight import Gpu, gpus
from prag_core.config import Columns, CorpusConfig, ModelConfig
from prag_core.config_file import read_config
from prag_core.data.inspection import CorpusSummary, inspect_corpus
from prag_core.errors import ConfigError, InputError

# On a GPU: open weights, small enough for any recent one, and one of the models of the paper.
GPU_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
_FORMATS = "JSON Lines (.jsonl, .ndjson, .json), TSV (.tsv), Parquet (.parquet) or text (.txt, .md); .gz may follow"


@dataclass(frozen=True)
class Beginning:
    """What `initialize` has found and written.

    `corpus` and `store` are the paths that the configuration `file` names. `gpu` is the GPU of this machine for which
    `model` was chosen, or None.
    """

    summary: CorpusSummary
    file: Path
    corpus: str
    store: str
    model: str
    gpu: Gpu | None


def initialize(corpus: str, to: Path | None, columns: Columns, *, force: bool = False) -> Beginning:
    """Look at a corpus and write a configuration for it.

    Args:
        corpus: A file, folder or glob, or an fsspec URL of one.
        to: The file to write; by default `config.yaml` beside the corpus, or in the working folder for a URL.
        columns: The names of the corpus's fields, as far as they are not the usual ones.
        force: Whether an existing file is overwritten.

    Raises:
        InputError: when there is no corpus to use there.
        ConfigError: when the file exists already, or cannot be written.
    """
    file, named, store = _places(corpus, to)
    if file.exists() and not force:
        raise ConfigError(f"{file}: exists already", "add --force to overwrite it, or write another file by --to FILE")
    summary = _inspect(corpus, columns)
    gpu = next(iter(gpus()), None)
    model = GPU_MODEL if gpu else ModelConfig().name
    text = _config_text(named, store, summary.columns, model, gpu)
    read_config(text, str(file))  # a path that YAML would take for something else is found here
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error}", "write another file by --to FILE") from None
    return Beginning(summary, file, named, store, model, gpu)


def _inspect(corpus: str, columns: Columns) -> CorpusSummary:
    try:
        return inspect_corpus(CorpusConfig(path=corpus, columns=columns))
    except InputError as error:
        if "corpus." not in error.remedy:
            raise
        # There are no settings yet that the remedy could name.
        if "corpus.columns" in error.remedy:
            remedy = "name the fields by --text, --title and --id; they have the same names in all files of a corpus"
        else:
            remedy = f"name a file, or a folder with files, of {_FORMATS}"
        raise InputError(error.message, remedy) from None


def _places(corpus: str, to: Path | None) -> tuple[Path, str, str]:
    """Return the configuration's file, and the paths of the corpus and the store that it names.

    A configuration in the working folder names relative paths, which are short. Any other names absolute ones, since
    commands take relative paths from the folder in which they run.
    """
    here = Path.cwd()
    path = here / corpus if "://" not in corpus else None
    beside = here
    if path is not None and path.exists() and not (path.is_dir() and here.is_relative_to(path.resolve())):
        beside = path.resolve().parent if path.is_dir() else path.parent
    folder = to.absolute().parent if to else beside
    # A store within the corpus's folder would be read as a part of the corpus, unless it is hidden.
    within = path is not None and path.is_dir() and folder.resolve().is_relative_to(path.resolve())
    name = ".prag-store" if within else "prag-store"
    if folder.resolve() == here.resolve():
        return to or Path("config.yaml"), corpus, name
    return to or folder / "config.yaml", corpus if path is None else str(path.resolve()), str(folder / name)


def _config_text(corpus: str, store: str, columns: Columns, model: str, gpu: Gpu | None) -> str:
    changed = columns.model_dump(exclude_defaults=True)
    if gpu:
        chosen = f"""\
# Chosen because this machine has a GPU ({gpu.name}). It is fetched from the Hugging Face hub once.
model:
  name: {model}

run:
  profile: gpu
"""
    else:
        chosen = f"""\
# The base model is {model}, which comes with prag and runs on a CPU. It is for trying out.
# A larger one answers better; on a GPU:
# model:
#   name: {GPU_MODEL}    # or a folder, as transformers takes them
# run:
#   profile: gpu
"""
    named_columns = f"  # Which field is which.\n  {_yaml(columns=changed, indent=2)}\n" if changed else ""
    return f"""\
# Made by `prag init`. A setting that is not here has its default; any can be given on the command line instead, as in
# --set train.epochs=8. Relative paths start in the folder in which prag runs.

# All results: passages, adapters, index. A folder, or a URL such as s3://bucket/folder.
{_yaml(store=store)}

corpus:
  {_yaml(path=corpus)}
{named_columns}
{chosen}
# Questions about the passages are written by the base model, unless an OpenAI-compatible server does it:
# augment:
#   generator: openai
#   endpoint:
#     url: http://127.0.0.1:8000/v1
#     model: NAME

# How questions are answered: combine (passages in weights and prompt), prag (weights), rag (prompt), closed (neither).
# answer:
#   mode: combine
#   top_k: 1
"""


def _yaml(indent: int = 0, **setting: object) -> str:
    """Return one setting as YAML, its further lines indented; texts that YAML takes for something else are quoted."""
    text = yaml.safe_dump(setting, allow_unicode=True, width=10_000).rstrip()
    return text.replace("\n", "\n" + " " * indent)
