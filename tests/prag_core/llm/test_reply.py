"""What a reply says is separated from the reasoning before it, in the form of each family of models."""

from __future__ import annotations

import pytest

from prag_core.llm.reply import open_mark, reply_content, without_fence

SAID = "Tadeo Quill built it."


@pytest.mark.parametrize(
    "reply",
    [
        SAID,
        f"<think>\nWrong. Or [this]?\n</think>\n\n{SAID}",
        f"<THINK>wrong</Think>{SAID}",
        f"<think>\n\n</think>\n\n{SAID}",
        f"<thinking>wrong</thinking>{SAID}",
        f"<reasoning effort='low'>wrong</reasoning>\n{SAID}",
        f"<thought>wrong</thought><reflection>wrong</reflection>{SAID}",
        f"[THINK]wrong[/THINK]{SAID}",
        f"◁think▷wrong◁/think▷{SAID}",
        f"<seed:think>wrong</seed:think>{SAID}",
        f"<|begin_of_thought|>wrong<|end_of_thought|>\n<|begin_of_solution|>{SAID}<|end_of_solution|>",
        f"<|START_THINKING|>wrong<|END_THINKING|><|START_RESPONSE|>{SAID}<|END_RESPONSE|>",
        f"<|channel>thought\nwrong<channel|>{SAID}",
        f"wrong, and the prompt has opened it</think>{SAID}",
        f"<think>wrong <think>nested</think> wrong</think>{SAID}",
        f"<think>wrong</think>{SAID}<think>wrong</think>",
        f"<think>wrong</think><answer>{SAID}</answer>",
        f"<|channel|>analysis<|message|>wrong<|end|><|start|>assistant<|channel|>final<|message|>{SAID}<|return|>",
        f"<|start|>assistant<|channel|>analysis<|message|>wrong<|end|><|start|>assistant<|channel|>final"
        f" <|constrain|>json<|message|>{SAID}",
        f"analysisWe need the builder.assistantfinal{SAID}",
        f"{SAID}<|im_end|>\n<|im_start|>user\nwrong",
        f"{SAID}<|eot_id|>wrong",
        f"{SAID}<end_of_turn>\n<start_of_turn>user",
        f"<thought_process>wrong</thought_process>{SAID}",
        f"<REASONING_SCRATCHPAD>wrong</REASONING_SCRATCHPAD>{SAID}",
        f"&lt;think&gt;wrong&lt;/think&gt;{SAID}",
        f"Here is my thought process:\nwrong\n\nHere is my response:\n{SAID}",
        f"Here are my reasoning steps:\nwrong\n[BEGIN FINAL RESPONSE]\n{SAID}\n[END FINAL RESPONSE]",
        f"### Reasoning\nAnswer: wrong\n\n### Final Answer\n{SAID}",
        f"```thinking\nwrong\n```\n{SAID}",
        f"<REASONING>wrong</REASONING><CONCLUSION>{SAID}</CONCLUSION>",
        f"<think>wrong</think><answer><|begin_of_box|>{SAID}<|end_of_box|></answer>",
        f"analysis We need the builder.assistant final{SAID}",
        f"commentaryWe need the builder.assistantfinal{SAID}",
        f"{SAID}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>wrong",
        f"[|assistant|]{SAID}[|endofturn|][|user|]wrong",
        f"{SAID}\n\n### Instruction:\nwrong",
        f"{SAID}\n\nUser: wrong",
    ],
)
def test_each_family_is_understood(reply: str) -> None:
    content = reply_content(reply)
    assert content is not None
    assert content.strip() == SAID


@pytest.mark.parametrize(
    "reply",
    [
        f"<think>{SAID}",
        f"Sure! <think>{SAID}",
        f"<think>a</think><think>{SAID}",
        f"[THINK]{SAID}",
        f"<|channel|>analysis<|message|>{SAID}",
        f"analysisWe need to find it. {SAID}",
        f"<think>{SAID}</thi",
        f"<thought_process>{SAID}",
        f"Here is my thought process:\n{SAID}",
        f"Here are my reasoning steps:\n{SAID}",
        f"```thinking\n{SAID}",
        f"<|channel|>analysis<|message|>This is final<|end|><|start|>assistant<|channel|>commentary<|message|>{SAID}",
    ],
)
def test_reasoning_that_does_not_end_says_nothing(reply: str) -> None:
    assert reply_content(reply) is None


def test_marks_of_the_passage_are_its_words() -> None:
    about = "Qwen writes <think> and </think> around its reasoning, and ends a turn by <|im_end|>."
    said = "Around its reasoning, Qwen writes <think> and </think>; <|im_end|> ends its turns."
    assert reply_content(said, about) == said
    assert reply_content(f"<think>\nwrong\n</think>{said}", about) == said
    assert reply_content(f"<think>{said}", about) is None


def test_text_about_reasoning_is_left_alone() -> None:
    for text in ("He thinks <b>", "a < think > b", "<thinker>x</thinker>", "<think/> x", "analysis of costs", "1 </p>"):
        assert reply_content(text) == text


def test_pairs_need_no_heading_after_reasoning() -> None:
    assert reply_content('Reasoning: I ask who.\n\n[{"a": 1}]') == '[{"a": 1}]'
    assert reply_content('**Thoughts:** who\n```json\n[{"a": 1}]\n```') == '```json\n[{"a": 1}]\n```'
    lines = "Q: Who? | A: He.\nQuestion: Where?\nAnswer: Here."
    assert (reply_content(f"Thinking: who\n\n{lines}") or "").strip() == lines


def test_a_prompt_may_open_the_reasoning() -> None:
    assert open_mark("<|im_start|>assistant\n<think>\n") == "<think>"
    assert open_mark("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert open_mark("<|im_start|>assistant\n") == ""


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("```\na\nb\n```", "a\nb"),
        ("\n```text\na\n```\nI hope that helps.", "a"),
        ("~~~\na", "a"),
        ("a ``` b", "a ``` b"),
        ("```a```", "a"),
        ("````md\n```\na\n```\n````", "```\na\n```"),
    ],
)
def test_a_fence_around_a_text(text: str, inside: str) -> None:
    assert without_fence(text) == inside
