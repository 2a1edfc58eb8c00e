"""Requests and responses of the HTTP API, as its OpenAPI document describes them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from pipelines.serving.errors import ErrorBody, check_limit, invalid_field
from pipelines.serving.fields import Strict, unicode_text
from prag_core.config import Config, ServeConfig
from prag_core.inference.question import question_problem
from prag_core.inference.request import Request
from prag_core.prompts import Role
from prag_core.records import MAX_STRENGTH, Answer, AskedMode, Finish, MergeRule, Mode, UsedPassage

QUESTION = "Who built the Cazambra Lighthouse?"
MAX_SEED = 2**63 - 1
# Examples for the OpenAPI document.
_PASSAGE: JsonDict = {
    "id": "p1", "ids": ["p1"], "key": "5ba1c3f0a2b84f6d", "title": "Cazambra Lighthouse", "score": 6.2,
    "used": ["weights", "prompt"], "weight": 1.0, "fallback": False, "text": None, "adapter": None,
}  # fmt: skip
_ANSWER: JsonDict = {
    "answer": "Ilvane Dost", "mode": "combine", "finish": "stop", "passages": [_PASSAGE],
    "snapshot": "20261101T020000-9b1f4c2d", "tokens": {"prompt": 171, "new": 6},
    "timings_ms": {"retrieve": 2.0, "fetch": 4.1, "inject": 1.2, "prefill": 180.0, "decode": 310.0}, "why": "",
}  # fmt: skip


Text = Annotated[str, AfterValidator(unicode_text)]
Temperature = Annotated[float, Field(ge=0, le=2, description="0 takes the most likely token each time.")]
TopP = Annotated[
    float, Field(gt=0, le=1, description="Draw among the most likely tokens that have this share of the probability.")
]
Seed = Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED, description="The same seed and prompt draw the same tokens.")]
Stop = Annotated[Text, Field(min_length=1, max_length=100)]


class AnswerRequest(Strict):
    """A question and how to answer it. Fields that are absent or null are as the server's `answer` section says."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"question": QUESTION, "mode": "combine", "top_k": 3}, {"question": QUESTION}]}
    )

    question: Text = Field(min_length=1, description="At most `serve.max_question_chars` characters.")
    mode: AskedMode | None = Field(
        None,
        description="`closed`: the bare model; `rag`: passages in the prompt; `prag`: in the weights; `combine`: both; "
        "`auto`: one of these, chosen by what is found.",
    )
    top_k: int | None = Field(None, ge=1, description="Passages to use, at most `serve.max_top_k`.")
    weights: MergeRule | None = Field(
        None, description="How the adapters are added: `sum`, `mean`, or `score` (by score in relation to the best)."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=MAX_STRENGTH,
        description="A factor for the adapters' weights: by default 1, in `combine` `answer.combine_strength`.",
    )
    max_tokens: int | None = Field(None, ge=1, description="Tokens of the answer, at most `serve.max_tokens`.")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Annotated[list[Stop], Field(max_length=4)] | None = Field(None, description="Texts that end the answer.")
    min_score: float | None = Field(None, ge=0, description="Passages with a lower score are not used.")
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Seconds after which the answer is useless; at most `serve.deadline_s`. In a batch they count "
        "from when the question's turn comes.",
    )
    stream: bool | None = Field(None, description="Send the text as server-sent events as it is made.")
    details: bool | None = Field(None, description="Send each passage's text, and how its adapter was trained.")


class AdapterUse(BaseModel):
    """How a passage's adapter was trained."""

    tokens: int = Field(description="Training tokens, over all epochs.")
    last_loss: float = Field(description="The loss of its last training step.")
    seconds: float = Field(description="Its share of the training time.")


class PassageUse(BaseModel):
    """A retrieved passage and how it was used.

    `fallback`: its adapter was missing, late or damaged, so the passage went into the prompt.
    """

    id: str = Field(description="The first of its ids in the corpus.")
    ids: list[str]
    key: str = Field(description="The hash of its title and text.")
    title: str
    score: float = Field(description="BM25.")
    used: list[Literal["weights", "prompt"]]
    weight: float = Field(description="The factor of its adapter; 0 when it was not used.")
    fallback: bool
    text: str | None = Field(None, description="The passage, with `details`.")
    adapter: AdapterUse | None = Field(None, description="Its adapter's training, with `details` if it was used.")


class TokenCounts(BaseModel):
    """Tokens of the prompt and of the answer."""

    prompt: int
    new: int


class AnswerResponse(BaseModel):
    """An answer, the passages that it used, and where its time went."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWER]})

    answer: str
    mode: Mode = Field(description="The mode that was used.")
    why: str = Field(description="Why `auto` chose this mode; empty where the request named it.")
    finish: Finish
    passages: list[PassageUse]
    snapshot: str = Field(description="The snapshot that answered.")
    timings_ms: dict[str, float] = Field(description="Milliseconds by step.")
    tokens: TokenCounts


class BatchRequest(Strict):
    """Many questions in one request. Each counts for the key's rate."""

    requests: list[AnswerRequest] = Field(min_length=1, description="At most `serve.max_batch`; none may stream.")


class BatchItem(BaseModel):
    """The answer to one question of a batch, or its error."""

    answer: AnswerResponse | None = None
    error: ErrorBody | None = None


class BatchResponse(BaseModel):
    """The answers and errors, in the order of the questions."""

    answers: list[BatchItem]


class Ready(BaseModel):
    """The replica answers questions from this snapshot."""

    snapshot: str


class About(BaseModel):
    """What this server answers with."""

    model: str = Field(description="The base model.")
    snapshot: str
    mode: AskedMode = Field(description="The mode of a request that names none.")
    modes: list[AskedMode]
    example_questions: list[str]


class Health(BaseModel):
    """The replica is alive."""

    status: Literal["ok"] = "ok"


def to_request(
    body: AnswerRequest,
    config: Config,
    access: frozenset[str] | None,
    history: tuple[tuple[Role, str], ...] = (),
    names: Mapping[str, str] = MappingProxyType({}),
) -> Request:
    """Return the request for the service, within the server's limits.

    `access` are the caller's tags, `history` the turns before the question. `names` are what the caller calls the
    fields, where it is something else.

    Raises:
        ApiError: naming the field that is wrong or beyond a limit, as the caller calls it.
    """

    def name(field: str) -> str:
        return names.get(field, field)

    limits = config.serve
    mode = body.mode or config.answer.mode
    if mode not in limits.modes:
        raise invalid_field(name("mode"), f"served here: {', '.join(limits.modes)}")
    check_length(name("question"), body.question, limits)
    if problem := question_problem(body.question):
        raise invalid_field(name("question"), problem)
    top_k = body.top_k or config.answer.top_k
    check_limit(name("top_k"), top_k, limits.max_top_k)
    # None is the default of the recipe's template, which was checked against the limit at the start.
    max_tokens = body.max_tokens or config.answer.max_new_tokens
    check_limit(name("max_tokens"), max_tokens or 1, limits.max_tokens)
    return Request(
        question=body.question,
        mode=mode,
        top_k=top_k,
        weights=body.weights or config.answer.weights,
        strength=body.strength,
        max_new_tokens=max_tokens,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed or 0,
        stop=tuple(body.stop or ()),
        min_score=body.min_score or 0.0,
        history=history,
        access=access,
    )


def check_length(param: str, text: str, limits: ServeConfig) -> None:
    """Check that a text is within `serve.max_question_chars`.

    Raises:
        ApiError: when it is longer.
    """
    check_limit(param, len(text), limits.max_question_chars, " characters")


def from_answer(answer: Answer, details: bool | None = None) -> AnswerResponse:
    """Return an answer as clients get it; with `details`, with its passages' texts and adapters."""
    return AnswerResponse(
        answer=answer.text,
        mode=answer.mode,
        why=answer.why,
        finish=answer.finish,
        passages=[_passage(passage, bool(details)) for passage in answer.passages],
        snapshot=answer.snapshot,
        timings_ms={step: round(spent, 3) for step, spent in answer.milliseconds.items()},
        tokens=TokenCounts(prompt=answer.prompt_tokens, new=answer.new_tokens),
    )


def _passage(passage: UsedPassage, details: bool) -> PassageUse:
    trained = AdapterUse(
        tokens=passage.tokens, last_loss=round(passage.last_loss, 4), seconds=round(passage.seconds, 2)
    )
    used: list[Literal["weights", "prompt"]] = ["weights"] if passage.in_weights else []
    return PassageUse(
        id=passage.sources[0] if passage.sources else passage.key,
        ids=list(passage.sources),
        key=passage.key,
        title=passage.title,
        score=passage.score,
        used=[*used, "prompt"] if passage.in_prompt else used,
        weight=passage.weight,
        # The note itself may name objects of the store, so it goes to the log only.
        fallback=bool(passage.note),
        text=passage.text if details else None,
        adapter=trained if details and passage.in_weights else None,
    )
