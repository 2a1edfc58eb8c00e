"""Any OpenAI-compatible endpoint as a Generator: OpenAI's own, vLLM, SGLang, llama.cpp, Ollama."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from prag_core.config import EndpointConfig
from prag_core.errors import GenerationError, PromptTooLongError
from prag_core.llm.generator import Prompt


class OpenAIGenerator:
    """Any OpenAI-compatible endpoint as a Generator: many requests at once, retried with growing pauses.

    Chat prompts go to `/chat/completions`, plain ones to `/completions`. `top_k` is not part of the protocol and
    is left out. Call it from a thread without a running event loop.
    """

    def __init__(self, endpoint: EndpointConfig) -> None:
        # The URL and the key are facts of one machine; the model is what decides the text.
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
        """Return one text a prompt, or its error once `endpoint.retries` are spent; see `Generator`.

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
        # Local servers want no key, but the client insists on one.
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
            # Its text is only "Connection error."; what was wrong is in its cause.
            raise self._error(error.__cause__ or error, key, "start the server or mend augment.endpoint.url") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._error(
                error, key, f"set {self._endpoint.api_key_env} to a key that the endpoint takes"
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
            return self._error(error, key, "raise augment.endpoint.retries, or try when the endpoint is healthy")
        except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
            return self._error(error, key, "the reply is not what the OpenAI protocol says; check the server")
        return text or ""

    def _error(self, error: BaseException, key: str, remedy: str) -> GenerationError:
        """Return what went wrong in words that never hold the key, though a server may echo it."""
        what = f"{type(error).__name__}: {error}".replace(key, "[key]")[:500]
        endpoint = self._endpoint
        return GenerationError(
            f"{endpoint.url}, model {endpoint.model!r}, after up to {endpoint.retries} retries: {what}", remedy
        )
