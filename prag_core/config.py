"""All settings of a run, one class for each section of the configuration file.

The file holds both machine facts (paths, devices, batch sizes, actors) and science (recipes). Only the science enters
a fingerprint: see `prag_core.recipe`. Unknown settings are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from prag_core.errors import ConfigError
from prag_core.recipe import RECIPES, AugmentRecipe, Schedule, TrainRecipe
from prag_core.records import (
    ASKED_MODES,
    DEFAULT_COMBINE_STRENGTH,
    DEFAULT_TOP_K,
    DEFAULT_WEIGHTS,
    MAX_STRENGTH,
    AskedMode,
    MergeRule,
    Template,
)

NO_CREDENTIALS_HERE = "take them out: they come from the AWS_* environment, or from the profile in storage.profile"
# In an S3 URL a key without a secret counts too, and a secret may hold a slash. A bucket may be an access point: arn:….
_CREDENTIALS = re.compile(r"://[^/@]*:[^/@]*@|s3a?://(?!arn:)([^/@]*:[^@]*|[^/]*)@")


def has_credentials(url: str) -> bool:
    """Return whether a URL holds a user and a password, or for S3 a key."""
    return _CREDENTIALS.search(url) is not None


def _check_url(url: str) -> str:
    if has_credentials(url):
        raise PydanticCustomError("credentials", "holds credentials")
    if not url.strip():
        raise PydanticCustomError("empty", "is empty: it would be the working folder")
    if "\0" in url:
        raise PydanticCustomError("zero_byte", "holds a zero byte, which no path may")
    return url


Url = Annotated[str, AfterValidator(_check_url)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Columns(_Strict):
    """The columns of a corpus file that hold a passage's id, title, text and access tags."""

    id: str = Field("id", description="The ids. A record without one is called by its file and line.")
    title: str = Field("title", description="The titles; a record may lack one.")
    text: str = Field("text", description="The texts. A record without one is rejected.")
    access: str | None = Field(
        None,
        description="Access tags: a list, or a text with commas between them. An asker needs one of them to see the "
        "passage. When this column is named, each record must have it; an empty value means public.",
    )


class CorpusConfig(_Strict):
    """Which files to read, and how to split their texts into passages."""

    path: Url = Field(description="A file, folder or glob, an fsspec URL of one, or package://PACKAGE/FILE.")
    format: Literal["auto", "jsonl", "tsv", "parquet", "text"] = Field(
        "auto", description="How the files are read; 'auto' goes by the ending of each."
    )
    columns: Columns = Columns()
    limit: int | None = Field(None, ge=1, description="Read only this many records, from the first on.")
    multiline_fields: bool = Field(
        False,
        description="In TSV, let a quoted field go on in the next line. By default such a row is rejected, because a "
        "stray quote looks the same and would swallow the rows after it.",
    )
    max_words: int = Field(200, ge=20, description="Longer texts are split at sentence ends.")
    max_record_bytes: int = Field(1_000_000, ge=1_000, description="Larger records are rejected.")


class ModelConfig(_Strict):
    """The frozen base model: a name or path that transformers knows, or the name of a packaged model."""

    name: str = Field(
        "smollm2-135m-instruct", description="A name or path that transformers knows, or the packaged model."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="'auto' is bfloat16 where the device multiplies it natively, else float32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto' is the GPU where there is one.")


# The requests that an endpoint gets at the same time: small servers refuse or delay more.
DEFAULT_CONCURRENCY = 16


class EndpointConfig(_Strict):
    """An OpenAI-compatible endpoint. Its key is read from the environment, never from a file."""

    url: str = Field("http://127.0.0.1:8000/v1", description="Its base URL, up to the version.")
    model: str = Field("default", description="The model's name there. It stands for the weights in the recipe.")
    api_key_env: str = Field("OPENAI_API_KEY", description="The environment variable that holds the key.")
    timeout_s: float = Field(60.0, gt=0, description="How long a reply may take.")
    retries: int = Field(5, ge=0, description="How often a failed request is repeated, with growing pauses.")
    send_seed: bool = Field(True, description="Send a seed with each request; some builds of vLLM fail with one.")


class AugmentConfig(_Strict):
    """How rewrites and question-answer pairs are made for each passage."""

    generator: Literal["transformers", "vllm", "openai", "none"] = Field(
        "transformers", description="'none' uses the passages that `import_file` covers and rejects the others."
    )
    strategy: Literal["paper", "lines", "writer"] | None = Field(
        None, description="How pairs are written; by default by a writer if the model has one, else as lines."
    )
    writer: str | None = Field(
        None, description="A writer, as `prag warmup --asking` names it; by default the packaged model's own."
    )
    import_file: str | None = Field(None, description="Augmentations made elsewhere, used before any is generated.")
    model: str | None = Field(
        None,
        description="The augmenting model. By default the base model, or where imports are to be completed the "
        "packaged model, which has a writer.",
    )
    endpoint: EndpointConfig = EndpointConfig()
    vllm: str = Field(
        "vllm",
        description="For the generator 'vllm': the command in vLLM's own environment, such as /opt/vllm/bin/vllm. "
        "Further arguments of `vllm serve` may follow.",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Requests in flight of each augmenting actor. By default 16 to an endpoint, 256 to vLLM, and in a "
        "local model's batch 16 rows on a CPU, on a GPU as many as its memory holds.",
    )
    complete_imports: bool = Field(
        True, description="Where the augmenting model has a writer, it asks about what imported pairs leave out."
    )
    pairs: int = Field(
        0,
        ge=0,
        description="Question-answer pairs per passage. 0: one for 7 words, from 8 to 24; with a writer and cloze "
        "questions up to 24.",
    )
    cloze: bool = Field(True, description="Fill up the pairs with cloze questions on facts that none asks about.")
    rewrites: int | None = Field(None, ge=0, description="Rewrites per passage; by default those that training uses.")
    attempts: int = Field(3, ge=1, description="Attempts per passage; then it is accepted with fewer, or rejected.")
    seed: int = Field(0, description="Where the drawing of replies starts: the same seed gives the same replies.")


def _one_of(noun: str, known: Collection[str]) -> AfterValidator:
    """Return a validator that accepts the `known` names only; `noun` says in its message what they name."""

    def check(name: str) -> str:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise PydanticCustomError("unknown_name", f"no such {noun}\n  → {hint}{noun}s: {', '.join(sorted(known))}")
        return name

    return AfterValidator(check)


class TrainConfig(_Strict):
    """The recipe that trains the adapters; each other field overrides one setting of it."""

    recipe: Annotated[str, _one_of("recipe", RECIPES)] = Field(
        "recall", description="The recipe whose settings count where none is given here."
    )
    rank: int | None = Field(None, ge=1, description="The rank of the factors A and B.")
    alpha: float | None = Field(None, gt=0, description="B·A is multiplied by alpha / rank.")
    targets: tuple[str, ...] | None = Field(None, min_length=1, description="Linear modules of each layer.")
    last_layers: int | None = Field(None, ge=1, description="Adapt only this many layers, counted from the output.")
    learning_rate: float | None = Field(
        None, gt=0, description="AdamW's. A rate that is given here counts as it is, whatever the width of the model."
    )
    schedule: Schedule | None = Field(
        None,
        description="The rate is the same in all of a passage's steps ('constant'), or falls in a straight line, "
        "from the whole rate in the first of n steps to 1/n of it in the last ('linear').",
    )
    weight_decay: float | None = Field(None, ge=0, description="AdamW's.")
    epochs: int | None = Field(None, ge=1, description="How often each example is trained.")
    examples_per_step: int | None = Field(None, ge=1, description="Examples of a passage in one optimizer step.")
    examples: Literal["paper", "questions"] | None = Field(
        None, description="'questions' asks each question alone, 'paper' half of them with the passage or a rewrite."
    )
    template: Template | None = Field(None, description="How to ask: 'direct', 'brief' or 'chain_of_thought'.")
    eos: bool | None = Field(None, description="End each target with the model's end-of-turn token.")
    loss: Literal["all", "answer"] | None = Field(
        None, description="The tokens that count: all of an example, or its answer and end alone."
    )
    max_tokens: int | None = Field(None, ge=32, description="Longer examples are left out.")
    initial_adapter: str | None = Field(None, description="Where training starts: a warm-up's name or a PEFT folder.")
    ablation: Literal["", "rewrites", "qa", "both"] | None = Field(None, description="The parts to leave out.")
    seed: int | None = Field(None, description="Of the random factors that training starts from.")


# The kinds of index, each with the module that provides it: see `prag_core.retrieval.kinds.IndexKind`.
INDEX_KINDS = {"lucene": "prag_core.retrieval.lucene"}
# The languages of Pyserini 1.6.0, by their ISO 639-1 codes. In ha, so, sw and yo it only splits words at white space.
LANGUAGES = (
    *("ar", "bn", "da", "de", "en", "es", "fa", "fi", "fr", "ha", "hi", "hu", "id", "it", "ja", "ko", "nl", "no"),
    *("pl", "pt", "ru", "so", "sv", "sw", "te", "th", "tr", "uk", "yo", "zh"),
)


class IndexConfig(_Strict):
    """How the stored corpus is indexed and searched."""

    kind: Annotated[str, _one_of("index kind", INDEX_KINDS)] = Field("lucene", description="'lucene' is BM25.")
    language: Annotated[str, _one_of("language", LANGUAGES)] = Field("en", description="The language of the corpus.")
    k1: float = Field(0.9, ge=0, description="BM25: how much further occurrences of a term count.")
    b: float = Field(0.4, ge=0, le=1, description="BM25: how much a long passage counts less; 0 is not at all.")


class AnswerConfig(_Strict):
    """How a question is answered where its request does not say."""

    mode: AskedMode = Field(
        "combine",
        description="Where the passages go: 'closed' nowhere, 'rag' prompt, 'prag' weights, 'combine' both; 'auto' "
        "chooses for each question.",
    )
    top_k: int = Field(DEFAULT_TOP_K, ge=1, le=20, description="How many passages are retrieved.")
    weights: MergeRule = Field(
        DEFAULT_WEIGHTS,
        description="How adapters are added: 'sum' (each whole), 'mean' (1/k each), or 'score' (the square of a "
        "passage's score in relation to the best one's).",
    )
    combine_strength: float = Field(
        DEFAULT_COMBINE_STRENGTH, gt=0, le=MAX_STRENGTH, description="Factor of adapter weights in combine."
    )
    reader: str | None = Field(
        None, description="A reader, added where passages are in the prompt: `prag warmup --reading`."
    )
    reader_strength: float = Field(0.4, gt=0, le=MAX_STRENGTH, description="Its weight; best near combine_strength.")
    max_new_tokens: int | None = Field(None, ge=1, le=1024, description="By default 32, or 128 if the model reasons.")
    batch_size: int = Field(16, ge=1, description="Questions that are decoded together.")


class ServeConfig(_Strict):
    """How a serving replica runs: machine facts, which never enter a fingerprint.

    Five defaults are higher where a replica has a GPU; see "With a GPU" in the guide to serving.
    """

    slots: int = Field(16, ge=1, description="The most requests that decode together.")
    # With half as many waiting requests as slots, a request that waits takes little longer than one that does not.
    max_queue: int = Field(8, ge=0, description="The most requests that wait for a slot; further ones are refused.")
    prefill_chunk: int = Field(512, ge=16, description="The most prompt tokens read between two decoding steps.")
    batch_tokens: int = Field(32_768, ge=1024, description="The most tokens in all slots together; bounds memory.")
    cache_bytes: int = Field(1_000_000_000, ge=0, description="Memory for adapters, in bytes.")
    disk_cache_bytes: int = Field(10_000_000_000, ge=0, description="Local disk for adapters, in bytes; 0 for none.")
    fetch_timeout_s: float = Field(
        2.0,
        gt=0,
        description="How long an adapter may take to arrive; after that, its passage goes into the prompt instead.",
    )
    fetch_threads: int = Field(16, ge=1, description="Adapters fetched at the same time.")
    negative_ttl_s: float = Field(10.0, ge=0, description="How long to wait before retrying an adapter that failed.")
    refresh_s: float = Field(10.0, gt=0, description="How often to check the store for a new snapshot.")
    stuck_s: float = Field(60.0, gt=0, description="A replica whose decoding step or search takes longer is replaced.")

    host: str = Field("127.0.0.1", description="The address to listen on; all but loopback addresses need api_keys.")
    port: int = Field(8000, ge=1, le=65535, description="The port to listen on.")
    api_keys: str | None = Field(None, description="The file of keys that `prag keys` writes.")
    rate_per_minute: int = Field(600, ge=1, description="Questions per minute for a key without a rate of its own.")
    modes: tuple[AskedMode, ...] = Field(
        ASKED_MODES, min_length=1, description="The modes that a request may name; 'auto' may use each of the others."
    )
    example_questions: tuple[str, ...] = Field((), description="Questions that the page offers to click.")
    deadline_s: float = Field(60.0, gt=0, description="How long a question may take; in a batch, each has this time.")
    max_body_bytes: int = Field(1_000_000, ge=1_000, description="Larger request bodies are refused.")
    max_question_chars: int = Field(4_000, ge=1, description="Limit for a question, or for a chat's messages together.")
    max_top_k: int = Field(10, ge=1, description="The most passages per answer; at least answer.top_k.")
    max_tokens: int = Field(256, ge=1, description="The most new tokens per answer; at least answer.max_new_tokens.")
    max_batch: int = Field(64, ge=1, description="The most questions in one batch request.")
    min_replicas: int = Field(1, ge=1, description="Replicas that run whatever the load is.")
    max_replicas: int = Field(1, ge=1, description="If above min_replicas, the number of replicas follows the load.")
    target_ongoing_requests: float = Field(16.0, gt=0, description="With more requests each, another replica starts.")
    upscale_delay_s: float = Field(10.0, ge=0, description="How long the load must be higher to start a replica.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long the load must be lower to stop a replica.")


# The defaults of a replica with a GPU. Up to some hundred rows, a decoding step takes about as long as it takes to read
# the weights. A chunk of 8,192 tokens is enough to keep a GPU busy, and takes as long as some steps.
ON_A_GPU: dict[str, Any] = {
    "slots": 64,
    "max_queue": 32,
    "prefill_chunk": 8192,
    "batch_tokens": 131_072,
    "target_ongoing_requests": 64.0,
}


class ActorsConfig(_Strict):
    """The actors of one stage, where they differ from those that `run` gives to every stage."""

    actors_min: int | None = Field(None, ge=1, description="By default run.actors_min.")
    actors_max: int | None = Field(None, ge=1, description="By default run.actors_max.")
    actor_cpus: float | None = Field(None, gt=0, description="By default run.actor_cpus.")
    actor_gpus: float | None = Field(None, ge=0, description="By default run.actor_gpus; 0 where no model runs on one.")


class RunConfig(_Strict):
    """Where and how the job runs: machine facts, which never enter a fingerprint."""

    profile: Literal["laptop", "gpu", "cluster"] = Field(
        "laptop", description="How much a job may use; the settings below replace single numbers of it."
    )
    actors_min: int | None = Field(None, ge=1, description="Actors with a model that a stage starts with.")
    actors_max: int | None = Field(None, ge=1, description="The most actors with a model that a stage may have.")
    actor_cpus: float | None = Field(None, gt=0, description="CPUs per actor.")
    actor_gpus: float | None = Field(None, ge=0, description="GPUs per actor; 0 on a cluster without GPUs.")
    augment: ActorsConfig = Field(ActorsConfig(), description="The actors that augment.")
    train: ActorsConfig = Field(ActorsConfig(), description="The actors that train.")
    answer: ActorsConfig = Field(ActorsConfig(), description="What answers: replicas, canaries, an evaluation.")
    partitions: int | None = Field(None, ge=1, description="Blocks of a shuffle; by default 1 up to 20,000 passages.")
    augment_batch: int = Field(8, ge=1, description="The fewest augmentations to store together.")
    train_batch: int = Field(16, ge=1, description="The fewest passages of a training task; the most fill one shard.")
    commit_every_s: float = Field(120.0, ge=0, description="Commit what is done this often, full shard or not.")
    tokens_per_step: int | None = Field(None, ge=64, description="Token budget of a training step, padding included.")
    checkpoint_activations: bool = Field(False, description="Saves memory; costs a second forward pass in training.")
    max_reject_share: float = Field(0.5, ge=0, le=1, description="A run with more rejects fails; bad records count.")
    passage_attempts: int = Field(3, ge=1, description="How many workers a passage may crash before it is rejected.")
    passage_timeout_s: float = Field(600.0, gt=0, description="The longest step of training or decoding, or reply.")
    worker_memory_gb: float | None = Field(None, gt=0, description="By default its share of the node's memory for Ray.")


class StorageConfig(_Strict):
    """How to reach the store and the input files, and what to keep in the store.

    These are machine facts, which never enter a fingerprint. Inputs at s3:// URLs are on the same server as the store.
    Credentials do not belong here: they come from the AWS_* environment, or from the profile that `profile` names.
    """

    endpoint_url: Url | None = Field(None, description="An S3 server other than Amazon's; by default AWS_ENDPOINT_URL.")
    region: str | None = Field(None, description="The S3 region; by default AWS_DEFAULT_REGION.")
    profile: str | None = Field(None, description="The name of a profile in the usual AWS files.")
    anon: bool = Field(False, description="Read a public bucket without credentials.")
    retries: int = Field(5, ge=0, description="How often a failed request is repeated.")
    timeout_s: float = Field(30.0, gt=0, description="How long to wait for a connection or an answer.")
    range_reads: Literal["obstore", "s3fs"] = Field(
        "obstore",
        description="What reads an adapter from S3: obstore is faster, and leaves to s3fs what it cannot do.",
    )
    adapter_dtype: Literal["bfloat16", "float32", "int8"] = Field(
        "bfloat16", description="How new adapters are stored; each ledger row says which one it has."
    )
    shard_mb: float = Field(128.0, gt=0, description="Size of a full shard of adapters, in millions of bytes.")
    keep_snapshots: int = Field(5, ge=1, description="How many of the newest snapshots `prag gc` keeps.")


class Config(_Strict):
    """The whole configuration of a run."""

    store: Url = Field(description="The folder or fsspec URL of the store, which holds all results of a run.")
    storage: StorageConfig = StorageConfig()
    corpus: CorpusConfig
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    index: IndexConfig = IndexConfig()
    answer: AnswerConfig = AnswerConfig()
    serve: ServeConfig = ServeConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _fit_serving_to_the_profile(self) -> Self:
        if self.run.profile != "laptop" and self.run.actor_gpus != 0:
            chosen = self.serve.model_fields_set
            defaults = {name: value for name, value in ON_A_GPU.items() if name not in chosen}
            object.__setattr__(self, "serve", self.serve.model_copy(update=defaults))
        return self


def check_defaults(config: Config, max_new_tokens: int | None = None) -> None:
    """Check that the defaults of a question are within the server's limits.

    Args:
        config: The configuration.
        max_new_tokens: The default of the recipe's template, which counts where `answer.max_new_tokens` is not set.

    Raises:
        ConfigError: names the default and the limit.
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


def augment_recipe(config: AugmentConfig, generator_fingerprint: str, train: TrainRecipe) -> AugmentRecipe:
    """Return the augment recipe of a configuration and an augmenting model, for adapters of the recipe `train`.

    Where the configuration names no strategy, it is `lines`. A writer makes a recipe of its own of it
    (`prag_core.store.writers.Writer.augment_recipe`).
    """
    # A recipe of questions alone never reads a rewrite, and writing one takes as long as several pairs.
    rewrites = 0 if train.examples == "questions" else 1
    return AugmentRecipe(
        generator=generator_fingerprint,
        strategy=config.strategy or "lines",
        pairs=config.pairs,
        rewrites=rewrites if config.rewrites is None else config.rewrites,
        attempts=config.attempts,
        seed=config.seed,
        imported=config.import_file is not None,
        cloze=config.cloze,
    )


def train_recipe(config: TrainConfig) -> TrainRecipe:
    """Return the named recipe with the configuration's overrides.

    `initial_adapter` is left out: the recipe's `start` is the fingerprint of its factors, which the caller must set.
    """
    overrides = config.model_dump(exclude={"recipe", "initial_adapter", "ablation"}, exclude_none=True)
    if config.ablation is not None:
        overrides["without"] = config.ablation
    if config.learning_rate is not None:
        overrides["rate_width"] = 0  # A rate that the configuration gives is the rate of its model.
    return replace(RECIPES[config.recipe], **overrides)


def s3_options(config: StorageConfig) -> dict[str, Any]:
    """Return the arguments of `s3fs.S3FileSystem` that say which server to ask, and as whom."""
    options: dict[str, Any] = {}
    if config.endpoint_url is not None:
        options["endpoint_url"] = config.endpoint_url
    if config.region is not None:
        options["client_kwargs"] = {"region_name": config.region}
    if config.profile is not None:
        options["profile"] = config.profile
    if config.anon:
        options["anon"] = True
    return options


def s3_client_config(retries: int, timeout_s: float) -> dict[str, Any]:
    """Return botocore's settings for how often a failed request is repeated, and how long one may take."""
    return {
        "connect_timeout": timeout_s,
        "read_timeout": timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": retries + 1},
    }
