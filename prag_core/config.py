"""The one configuration: a YAML file, dotted overrides, and nothing that is not named here.

Machine facts (paths, devices, batch sizes, actors) and science (recipes) stand in one file for the user, but
only the science enters a fingerprint: see `prag_core.recipe`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from prag_core.errors import ConfigError
from prag_core.recipe import RECIPES, AugmentRecipe, TrainRecipe
from prag_core.records import MAX_STRENGTH, MODES, MergeRule, Mode, Template

NO_CREDENTIALS_HERE = "take them out: they come from the AWS_* environment, or from the profile in storage.profile"
# For S3 a key alone is one too, and a secret may hold a slash; the bucket may be an access point's arn:….
_CREDENTIALS = re.compile(r"://[^/@]*:[^/@]*@|s3a?://(?!arn:)([^/@]*:[^@]*|[^/]*)@")


def has_credentials(url: str) -> bool:
    """Whether a URL holds a user and a password, or for S3 a key."""
    return _CREDENTIALS.search(url) is not None


def _without_credentials(url: str) -> str:
    if has_credentials(url):
        raise PydanticCustomError("credentials", "holds credentials")
    return url


Url = Annotated[str, AfterValidator(_without_credentials)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Columns(_Strict):
    """The names under which a corpus file keeps a passage's id, title, text and access tags."""

    id: str = "id"
    title: str = "title"
    text: str = "text"
    access: str | None = Field(
        None,
        description="Tags of which a reader must hold one: a list, or a text with commas between them. When it is "
        "named each record must have it; empty means public.",
    )


class CorpusConfig(_Strict):
    """What is read, and how it becomes passages."""

    path: Url = Field(description="A file, a folder of files, a glob, or any fsspec URL of one.")
    format: Literal["auto", "jsonl", "tsv", "parquet", "text"] = "auto"
    columns: Columns = Columns()
    limit: int | None = Field(None, ge=1, description="Read only the first so many records.")
    max_words: int = Field(200, ge=20, description="Longer texts are split at sentence ends.")
    max_record_bytes: int = Field(1_000_000, ge=1_000, description="Longer records are rejected.")


class ModelConfig(_Strict):
    """The frozen base model: a name or a path as transformers takes them, or a packaged model's name."""

    name: str = "smollm2-135m-instruct"
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="'auto' is bfloat16 where the device multiplies it natively, else float32."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"


class EndpointConfig(_Strict):
    """An OpenAI-compatible endpoint. The key itself is read from the environment, never from a file."""

    url: str = "http://127.0.0.1:8000/v1"
    model: str = "default"
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(16, ge=1)
    timeout_s: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)


class AugmentConfig(_Strict):
    """How each passage is rewritten, asked about and answered."""

    generator: Literal["transformers", "openai", "none"] = Field(
        "transformers", description="'none' takes what `import_file` has and rejects the rest."
    )
    strategy: Literal["paper", "small"] = "small"
    import_file: str | None = Field(None, description="Augmentations made elsewhere; they come first.")
    model: str | None = Field(None, description="The augmenting model; the base model when absent.")
    endpoint: EndpointConfig = EndpointConfig()
    pairs: int = Field(3, ge=1, description="Question-answer pairs wanted a passage.")
    rewrites: int = Field(1, ge=0)
    attempts: int = Field(3, ge=1, description="Tries at a passage before it is accepted short or rejected.")
    seed: int = 0


def _known_recipe(name: str) -> str:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PydanticCustomError("recipe", f"no such recipe\n  → {hint}recipes: {', '.join(sorted(RECIPES))}")
    return name


class TrainConfig(_Strict):
    """Which recipe trains the adapters; the other fields override single settings of it."""

    recipe: Annotated[str, AfterValidator(_known_recipe)] = "small"
    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)
    targets: tuple[str, ...] | None = Field(None, min_length=1, description="Linear modules of each layer.")
    last_layers: int | None = Field(None, ge=1, description="Adapt only so many of the topmost layers.")
    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    epochs: int | None = Field(None, ge=1)
    examples: Literal["paper", "closed_book"] | None = None
    template: Template | None = Field(None, description="How questions are asked: 'direct' or 'chain_of_thought'.")
    eos: bool | None = None
    loss: Literal["all", "answer"] | None = None
    max_tokens: int | None = Field(None, ge=32)
    start: str | None = Field(
        None, description="What every adapter starts from: a warm-up's name in the store, or a PEFT adapter folder."
    )
    without: Literal["", "rewrites", "qa", "both"] | None = Field(
        None, description="The paper's ablation: train without the rewrites, without the questions, or on the text."
    )
    seed: int | None = None


class IndexConfig(_Strict):
    """BM25 over the stored corpus."""

    k1: float = Field(0.9, ge=0)
    b: float = Field(0.4, ge=0, le=1)


class AnswerConfig(_Strict):
    """How a question is answered when the request does not say."""

    mode: Mode = "combine"
    top_k: int = Field(3, ge=1, le=20)
    weights: MergeRule = "sum"
    combine_strength: float = Field(
        1.0,
        gt=0,
        le=MAX_STRENGTH,
        description="What the adapters' weights are multiplied by in the mode combine. Less than 1 leaves the model "
        "more of what it reads in its prompt.",
    )
    reader: str | None = Field(
        None,
        description="What `prag warmup --reading` printed: an adapter that has learned to read, added to the "
        "passages' own in the mode combine.",
    )
    reader_strength: float = Field(
        0.4, gt=0, le=MAX_STRENGTH, description="Its weight; combine_strength is best about as much."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, le=1024, description="By default 32, and 128 where the recipe's template lets the model reason."
    )
    batch_size: int = Field(16, ge=1, description="Questions answered in one forward pass.")


class ServeConfig(_Strict):
    """How a serving replica runs: machine facts, which never enter a fingerprint."""

    slots: int = Field(16, ge=1, description="Requests that decode together.")
    max_queue: int = Field(
        8,
        ge=0,
        description="Requests that wait beyond these; one more is turned away. As many as there are slots would wait "
        "for about as long as an answer takes: with half as many, what is accepted takes little longer than usual.",
    )
    prefill_chunk: int = Field(512, ge=16, description="Prompt tokens read before the running requests go on.")
    batch_tokens: int = Field(32_768, ge=1024, description="Tokens that all slots together hold; bounds memory.")
    cache_bytes: int = Field(1_000_000_000, ge=0, description="Adapters held in memory.")
    disk_cache_bytes: int = Field(10_000_000_000, ge=0, description="Adapters held on the local disk; 0: none.")
    fetch_timeout_s: float = Field(2.0, gt=0, description="A later adapter is replaced by its passage in the prompt.")
    fetch_threads: int = Field(16, ge=1, description="Adapters fetched at once.")
    negative_ttl_s: float = Field(10.0, ge=0, description="How long an adapter that failed is not tried again.")
    refresh_s: float = Field(10.0, gt=0, description="How often the store is asked for a new snapshot.")
    stuck_s: float = Field(
        60.0, gt=0, description="A replica that makes no step, or whose search does not end, for so long is replaced."
    )

    host: str = Field("127.0.0.1", description="Where to listen; an address that others reach needs api_keys.")
    port: int = Field(8000, ge=1, le=65535)
    api_keys: str | None = Field(None, description="The file of keys that `prag keys` writes; none: loopback only.")
    rate_per_minute: int = Field(600, ge=1, description="Questions a minute of a key that has no rate of its own.")
    modes: tuple[Mode, ...] = Field(MODES, min_length=1, description="The modes that may be asked for.")
    deadline_s: float = Field(
        60.0, gt=0, description="A question not answered by then is dropped; one of a batch has it for itself."
    )
    max_body_bytes: int = Field(1_000_000, ge=1_000)
    max_question_chars: int = Field(4_000, ge=1, description="Of a question, or of all messages of a chat.")
    max_top_k: int = Field(10, ge=1, description="The most passages of an answer; at least answer.top_k.")
    max_tokens: int = Field(
        256, ge=1, description="The most tokens of an answer that may be asked for; at least answer.max_new_tokens."
    )
    max_batch: int = Field(64, ge=1, description="Questions in one batch request.")
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1, description="More than min_replicas: their number follows the load.")
    target_ongoing_requests: float = Field(16.0, gt=0, description="Requests a replica before another one is started.")
    upscale_delay_s: float = Field(10.0, ge=0, description="How long it must be busier before one is started.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long it must be idler before one is ended.")


class RunConfig(_Strict):
    """Where and how the job runs: machine facts, which never enter a fingerprint."""

    profile: Literal["laptop", "gpu", "cluster"] = "laptop"
    actors_min: int | None = Field(None, ge=1, description="Model-holding actors a stage begins with.")
    actors_max: int | None = Field(None, ge=1, description="… and how many it may grow to.")
    actor_cpus: float | None = Field(None, gt=0, description="What each of them takes of its node.")
    actor_gpus: float | None = Field(None, ge=0, description="0 on a cluster without GPUs.")
    partitions: int | None = Field(
        None, ge=1, description="Blocks that a shuffle makes; by default one up to 20,000 passages."
    )
    augment_batch: int = Field(8, ge=1, description="Passages augmented and stored together.")
    train_batch: int = Field(
        8, ge=1, description="Passages of a training task at least; in a large corpus as many as fill a shard."
    )
    commit_every_s: float = Field(
        120.0, ge=0, description="What is trained is committed at least so often, in a smaller shard if need be."
    )
    tokens_per_step: int | None = Field(
        None,
        ge=64,
        description="Token budget of one training step, padding included (the profile's when absent); halved when "
        "memory is short.",
    )
    checkpoint_activations: bool = Field(
        False, description="Train with a fraction of the memory, at the price of a second forward pass."
    )
    max_reject_share: float = Field(
        0.5, ge=0, le=1, description="The run fails when more is rejected, bad records included."
    )
    passage_attempts: int = Field(
        3, ge=1, description="How often a passage may be in a worker that dies, before it is rejected once it is alone."
    )
    passage_timeout_s: float = Field(
        600.0,
        gt=0,
        description="How long a worker may be silent: training, without a step; augmenting, for each of its batch.",
    )
    worker_memory_gb: float | None = Field(
        None, gt=0, description="What a worker may hold; by default its share of what Ray counts as its node's memory."
    )


class StorageConfig(_Strict):
    """How the store is reached and what it keeps: machine facts, which never enter a fingerprint.

    Credentials have no place here: they come from the AWS_* environment, or from the profile that `profile` names.
    """

    endpoint_url: Url | None = Field(None, description="An S3 server other than Amazon's; else AWS_ENDPOINT_URL.")
    region: str | None = None
    profile: str | None = Field(None, description="The name of a profile in the usual AWS files.")
    anon: bool = Field(False, description="Read a public bucket without credentials.")
    retries: int = Field(5, ge=0, description="How often a failed request is tried again.")
    timeout_s: float = Field(30.0, gt=0, description="How long the store may take to connect or to answer.")
    adapter_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    shard_mb: float = Field(128.0, gt=0, description="Size of a full shard of adapters, in millions of bytes.")
    keep_snapshots: int = Field(5, ge=1, description="`prag gc` keeps so many of the newest snapshots.")


class Config(_Strict):
    """The whole configuration of a run."""

    store: Url = Field(description="A folder or an fsspec URL that holds everything the run makes.")
    storage: StorageConfig = StorageConfig()
    corpus: CorpusConfig
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    index: IndexConfig = IndexConfig()
    answer: AnswerConfig = AnswerConfig()
    serve: ServeConfig = ServeConfig()
    run: RunConfig = RunConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply dotted overrides such as `train.epochs=4`.

    Relative paths in the file (`store`, `corpus.path`, `augment.import_file`) stay relative to the working
    directory, as on the command line.

    Raises:
        ConfigError: for a missing file, broken YAML, an unknown key (with the nearest right one) or a wrong
            value; the message carries the key's dotted path.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file", "copy examples/demo.yaml and edit it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", "name a readable YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", "mend the line that the message names") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no settings", "it must be a YAML mapping; see examples/demo.yaml")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, str(path))


def parse_config(data: dict[str, Any], origin: str = "configuration") -> Config:
    """Check plain values against the schema; see `load_config` for what it raises."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, origin) for item in error.errors())) from None


def check_defaults(config: Config, max_new_tokens: int | None = None) -> None:
    """Check that what a question gets by default is within what one may ask for.

    Args:
        config: The configuration.
        max_new_tokens: What an answer has by default, where a recipe's template decides it.

    Raises:
        ConfigError: naming the default and the limit.
    """
    answer, serve = config.answer, config.serve
    tokens = answer.max_new_tokens or max_new_tokens or 0
    for name, value, limit, most in (
        ("answer.max_new_tokens", tokens, "serve.max_tokens", serve.max_tokens),
        ("answer.top_k", answer.top_k, "serve.max_top_k", serve.max_top_k),
    ):
        if value > most:
            raise ConfigError(
                f"{name} = {value}, the default, is beyond {limit} = {most}, the limit",
                f"lower the one (`--set {name}={most}`) or raise the other (`--set {limit}={value}`)",
            )


def dump_config(config: Config) -> str:
    """Return the YAML text of a configuration, defaults included, as a run keeps it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ConfigError(f"override {override!r} is not KEY=VALUE", "write it as train.epochs=4")
    *parents, last = dotted.strip().split(".")
    node = data
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name!r} holds no settings", "see examples/demo.yaml")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML", "quote it") from None


def _explain(item: Any, origin: str) -> str:
    location = tuple(str(part) for part in item["loc"])
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        siblings = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        hint = f"did you mean {'.'.join(filter(None, [prefix, near[0]]))}?" if near else ""
        return f"{origin}: unknown key {dotted}\n  → {hint or 'known here: ' + ', '.join(siblings)}"
    if item["type"] == "missing":
        return f"{origin}: {dotted} is required\n  → add it; see examples/demo.yaml"
    if item["type"] == "credentials":  # the value must not be repeated
        return f"{origin}: {dotted} {item['msg']}\n  → {NO_CREDENTIALS_HERE}"
    return f"{origin}: {dotted} = {item.get('input')!r}: {item['msg']}"


def _fields_at(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in location:
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def augment_recipe(config: AugmentConfig, generator_fingerprint: str) -> AugmentRecipe:
    """Return the augment recipe that a configuration and an augmenting model make."""
    return AugmentRecipe(
        generator=generator_fingerprint,
        strategy=config.strategy,
        pairs=config.pairs,
        rewrites=config.rewrites,
        attempts=config.attempts,
        seed=config.seed,
        imported=config.import_file is not None,
    )


def train_recipe(config: TrainConfig) -> TrainRecipe:
    """Return the named recipe with the configuration's overrides, but for `start`: only a reader knows its content."""
    overrides = {k: v for k, v in config.model_dump(exclude={"recipe", "start"}).items() if v is not None}
    return replace(RECIPES[config.recipe], **overrides)
