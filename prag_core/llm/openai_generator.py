"""A Generator for OpenAI-compatible endpoints: OpenAI, vLLM, SGLang, llama.cpp, Ollama."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prag_core.config import DEFAULT_CONCURRENCY, EndpointConfig
from prag_core.errors import GenerationError, PromptTooLongError, UnfinishedReplyError
from prag_core.llm.chat import WITHOUT_REASONING
from prag_core.llm.generator import Prompt

if TYPE_CHECKING:
    import openai


log = logging.getLogger(__name__)

# Tells vLLM, SGLang and llama.cpp what to hand to the model's chat template.
_TEMPLATE = "chat_template_kwargs"
# The words with which endpoints refuse a setting, and not its value or the prompt.
_REFUSES = re.compile(
    r"un(?:supported|recogni[sz]ed|known|expected)|not (?:support|permit|allow|recogni[sz])|instead|extra|deprecated",
    re.IGNORECASE,
)
# The words with which they say that a prompt is too long.
_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|(?:prompt|input) is too long|exceeds the maximum number of tokens"
    r"|too many tokens",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Session:
    """What belongs to one event loop: the client with its connections, and the gate for requests at the same time."""

    loop: asyncio.AbstractEventLoop
    client: openai.AsyncOpenAI
    gate: asyncio.Semaphore


class OpenAIGenerator:
    """Sends prompts to an OpenAI-compatible endpoint, and retries failed ones with back-off.

    At most `concurrency` requests are in flight. Chat prompts go to `/chat/completions`, plain ones to `/completions`.
    `top_k` is not part of the protocol and is ignored. A setting that the endpoint refuses by name is left out from
    then on; `max_tokens` is then called `max_completion_tokens`. `on_progress` is called after each attempt at a
    request. The key is `key`, or else that of the environment.
    """

    def __init__(
        self,
        endpoint: EndpointConfig,
        *,
        key: str | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        # URL and key belong to one machine; only the model decides the text.
        self.fingerprint = f"openai:{endpoint.model}"
        self.concurrency = concurrency
        self._endpoint = endpoint
        self._on_progress = on_progress
        # Local servers need no key, but the client requires one.
        self._key = key or os.environ.get(endpoint.api_key_env) or "unused"
        self._session: _Session | None = None
        # The settings that the endpoint does not know, as ("chat" or "plain", name).
        self._unknown: set[tuple[str, str]] = set()
        if not endpoint.send_seed:
            self._unknown |= {("chat", "seed"), ("plain", "seed")}

    async def ask(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> str | GenerationError:
        """Return the text that continues a prompt, or its error after `endpoint.retries` retries; see `Generator`.

        Raises:
            GenerationError: when the endpoint cannot be reached, refuses the key or does not know the model.
        """
        session = self._open()
        async with session.gate:
            return await self._ask(session.client, self._key, prompt, max_new_tokens, temperature, seed)

    async def close(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.client.close()

    def _open(self) -> _Session:
        """Return the session of the running event loop; it is made once, since a new connection costs milliseconds."""
        loop = asyncio.get_running_loop()
        if self._session is not None and self._session.loop is loop:
            return self._session
        import httpx
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        endpoint, on_progress = self._endpoint, self._on_progress

        class WholeReplies(DefaultAsyncHttpxClient):
            """Limits the time of a whole reply; httpx limits that of each piece, and a reply may have many."""

            async def send(self, *arguments: Any, **options: Any) -> Any:
                try:
                    async with asyncio.timeout(endpoint.timeout_s):
                        return await super().send(*arguments, **options)
                except TimeoutError:
                    raise httpx.ReadTimeout("the reply was not complete in time") from None
                finally:
                    on_progress()

        client = AsyncOpenAI(
            api_key=self._key,
            base_url=endpoint.url,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.retries,
            http_client=WholeReplies(timeout=endpoint.timeout_s),
        )
        self._session = _Session(loop, client, asyncio.Semaphore(self.concurrency))
        return self._session

    async def _ask(
        self, client: Any, key: str, prompt: Prompt, limit: int, temperature: float, seed: int
    ) -> str | GenerationError:
        import openai

        model = self._endpoint.model
        settings = self._settings(prompt, limit, temperature, seed)
        body = {"extra_body": {_TEMPLATE: settings.pop(_TEMPLATE)}} if _TEMPLATE in settings else {}
        try:
            if prompt.chat:
                messages = [{"role": "user", "content": prompt.text}]
                reply = await client.chat.completions.create(model=model, messages=messages, **settings, **body)
            else:
                reply = await client.completions.create(model=model, prompt=prompt.text, **settings)
            if said := getattr(reply, "error", None):
                return self._error(f"the reply is an error: {said}", key, "see what the server logs")
            if prompt.chat:
                return self._content(reply.choices[0], key, prompt, limit)
            text = reply.choices[0].text
            if text is None:
                return self._error("the reply has no text", key, "see what the server logs")
            return _before(text, prompt.stop)
        except openai.APITimeoutError as error:
            return self._error(error, key, "raise augment.endpoint.timeout_s or lower augment.concurrency")
        except openai.APIConnectionError as error:
            # Its text is only "Connection error."; its cause says more.
            cause = error.__cause__ or error
            raise self._error(cause, key, "start the server or correct augment.endpoint.url") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._error(
                error, key, f"set {self._endpoint.api_key_env} to a key that the endpoint accepts"
            ) from None
        except openai.NotFoundError as error:
            raise self._error(
                error, key, "check augment.endpoint.model and that augment.endpoint.url ends in /v1"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if error.code == "context_length_exceeded" or _TOO_LONG.search(_words(error)):
                return PromptTooLongError(*self._error(error, key, "split the passage (corpus.max_words)").args)
            if not self._learn(error, [*settings, *body.get("extra_body", {})], prompt):
                return self._error(error, key, "the endpoint refuses this prompt; see its message")
            return await self._ask(client, key, prompt, limit, temperature, seed)
        except openai.APIStatusError as error:
            return self._error(error, key, "raise augment.endpoint.retries, or try again when the endpoint is healthy")
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError) as error:
            return self._error(error, key, "the reply does not follow the OpenAI protocol; check the server")

    def _settings(self, prompt: Prompt, limit: int, temperature: float, seed: int) -> dict[str, Any]:
        """Return the settings of a request, in the form that the endpoint is known to accept."""
        settings: dict[str, Any] = {"max_tokens": limit, "temperature": temperature, "seed": seed}
        if prompt.stop:
            settings["stop"] = [prompt.stop]
        if prompt.chat:
            settings[_TEMPLATE] = dict(WITHOUT_REASONING)
            if (_kind(prompt), "max_tokens") in self._unknown:
                settings["max_completion_tokens"] = limit
        return {name: value for name, value in settings.items() if (_kind(prompt), name) not in self._unknown}

    def _learn(self, error: openai.APIStatusError, sent: Sequence[str], prompt: Prompt) -> bool:
        """Note the setting that an endpoint has refused by name; return whether there is one to do without."""
        text = _words(error)
        if not _REFUSES.search(text):
            return False
        known = {"max_completion_tokens"} if prompt.chat else {"max_tokens"}
        for name in sent:
            # Names of one word may be words of the prompt, which some endpoints repeat.
            named = (
                rf"\b{name}\b"
                if "_" in name
                else rf"['\"`]{name}['\"`]|(?:parameter|argument|field|supplied)s?:? {name}\b"
            )
            if name not in known and (error.param == name or re.search(named, text)):
                if (_kind(prompt), name) not in self._unknown:
                    log.warning("%s refuses the setting %s for %r", self._endpoint.url, name, self._endpoint.model)
                self._unknown.add((_kind(prompt), name))
                return True
        return False

    def _content(self, choice: Any, key: str, prompt: Prompt, limit: int) -> str | GenerationError:
        """Return the text of a chat's reply; reasoning that has a field of its own is left out."""
        message = choice.message
        text = None if choice.finish_reason == "content_filter" else message.content
        if isinstance(text, list):  # Mistral's form: parts of reasoning and of text
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is not None and text.strip():
            return _before(text, prompt.stop)
        if choice.finish_reason == "length":
            error = self._error(
                f"the model has used its {limit} tokens, for reasoning, before it replied",
                key,
                "turn its reasoning off",
            )
            return UnfinishedReplyError(*error.args)
        why = getattr(message, "refusal", None) or choice.finish_reason
        return self._error(f"the reply has no content ({why})", key, "see what the server logs")

    def _error(self, error: BaseException | str, key: str, remedy: str) -> GenerationError:
        """Return an error for the caller; its message never holds the key, even if the server's does."""
        cause = error if isinstance(error, str) else f"{type(error).__name__}: {_words(error)}"
        cause = cause.replace(key, "[key]")[:500]
        endpoint = self._endpoint
        return GenerationError(
            f"{endpoint.url}, model {endpoint.model!r}, after up to {endpoint.retries} retries: {cause}", remedy
        )


def _words(error: BaseException) -> str:
    """Return what an error says, with what the endpoint wrote if that has another form than OpenAI's."""
    import openai

    if not isinstance(error, openai.APIStatusError) or " - " in str(error):
        return str(error)
    written = error.response.text
    if isinstance(error.body, dict) and isinstance(items := error.body.get("detail"), list):
        # FastAPI's form. Its items repeat what was sent, too.
        written = json.dumps([[item.get("loc"), item.get("msg")] for item in items if isinstance(item, dict)])
    return f"{error} - {written}"


def _kind(prompt: Prompt) -> str:
    return "chat" if prompt.chat else "plain"


def _before(text: str, stop: str) -> str:
    """Return a text up to its stop, which some endpoints ignore or leave in; half a character becomes U+FFFD."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.split(stop)[0] if stop else text
