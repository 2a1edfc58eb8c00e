"""Asking a generator from a test."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prag_core.errors import GenerationError
from prag_core.llm.generator import Generator, Prompt, ask_all


def replies(generator: Generator, prompts: Sequence[Prompt], **settings: Any) -> list[str | GenerationError]:
    """Return the results of prompts that are asked at once."""

    async def ask() -> list[str | GenerationError]:
        try:
            return await ask_all(generator, prompts, **settings)
        finally:
            await generator.close()

    return asyncio.run(ask())
