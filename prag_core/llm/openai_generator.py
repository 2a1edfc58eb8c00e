"""A Generator for OpenAI-compatible endpoints: OpenAI, vLLM, SGLang, llama.cpp, Ollama."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from prag_core.config import EndpointConfig
from prag_core.errors import GenerationError, PromptTooLongError
from prag_core.llm.generator import Prompt


class OpenAIGenerator:
    """Sends prompts to an OpenAI-compatible endpoint, many at the same time, and retries failed ones with back-off.

    Chat prompts go to `/chat/completions`, plain ones to `/completions`. `top_k` is not part of the protocol and
    is ignored. Call it from a thread without a running event loop.
    """

    def __init__(self, endpoint: EndpointConfig) -> None:
        # URL and key belong to one machine; only the model decides the text.
        self.fingerprint = f"openai:{endpoint.model}"
        self._endpoint = endpoint

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str | GenerationError]:
        """Return one result for each prompt: its text, or its error after `endpoint.retries` retries; see `Generator`.

        Raises:
            GenerationError: when the endpoint cannot be reached, refuses the key or does not know the model.
        """
        if not prompts:
            return []
        return asyncio.run(self._generate(prompts, max_new_tokens, temperature, seed))

    async def _generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, seed: int
    ) -> list[str | GenerationError]:
        from openai import AsyncOpenAI

        endpoint = self._endpoint
        # Local servers need no key, but the client requires one.
        key = os.environ.get(endpoint.api_key_env) or "unused"
        gate = asyncio.Semaphore(endpoint.concurrency)
        async with AsyncOpenAI(
            api_key=key, base_url=endpoint.url, timeout=endpoint.timeout_s, max_retries=endpoint.retries
        ) as client:

            async def ask(prompt: Prompt) -> str | GenerationError:
                async with gate:
                    return await self._ask(client, key, prompt, prompt.limit(max_new_tokens), temperature, seed)

            return await asyncio.gather(*(ask(prompt) for prompt in prompts))

    async def _ask(
        self, client: Any, key: str, prompt: Prompt, limit: int, temperature: float, seed: int
    ) -> str | GenerationError:
        import openai

        settings: dict[str, Any] = {"max_tokens": limit, "temperature": temperature, "seed": seed}
        if prompt.stop:
            settings["stop"] = [prompt.stop]
        model = self._endpoint.model
        try:
            if prompt.chat:
                messages = [{"role": "user", "content": prompt.text}]
                reply = await client.chat.completions.create(model=model, messages=messages, **settings)
                text = reply.choices[0].message.content
            else:
                reply = await client.completions.create(model=model, prompt=prompt.text, **settings)
                text = reply.choices[0].text
        except openai.APITimeoutError as error:
            return self._error(error, key, "raise augment.endpoint.timeout_s or lower augment.endpoint.concurrency")
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
        except openai.BadRequestError as error:
            if error.code == "context_length_exceeded" or "context length" in str(error):
                return PromptTooLongError(*self._error(error, key, "split the passage (corpus.max_words)").args)
            return self._error(error, key, "the endpoint refuses this prompt; see its message")
        except openai.APIStatusError as error:
            return self._error(error, key, "raise augment.endpoint.retries, or try again when the endpoint is healthy")
        except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
            return self._error(error, key, "the reply does not follow the OpenAI protocol; check the server")
        return text or ""

    def _error(self, error: BaseException, key: str, remedy: str) -> GenerationError:
        """Return an error for the caller; its message never holds the key, even if the server's does."""
        cause = f"{type(error).__name__}: {error}".replace(key, "[key]")[:500]
        endpoint = self._endpoint
        return GenerationError(
            f"{endpoint.url}, model {endpoint.model!r}, after up to {endpoint.retries} retries: {cause}", remedy
        )
