"""What a model's reply says, without what surrounds it: reasoning before it, tags and a code fence around it.

Endpoints with a parser for reasoning return it in a field of its own. Others, and the local model, return it in the
text, each family of models with its own marks.
"""

from __future__ import annotations

import re

_TAGS = r"think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad|seed:think|details"
_MARK = re.compile(
    rf"(?P<open><(?:{_TAGS})(?:\s[^<>]*)?(?<!/)>|\[THINK\]|<\|(?:begin_of_thought|START_THINKING)\|>|◁think▷|<\|channel>)"
    rf"|</(?:{_TAGS})\s*>|\[/THINK\]|<\|(?:end_of_thought|END_THINKING)\|>|◁/think▷|<channel\|>",
    re.IGNORECASE,
)
# The form of gpt-oss: messages in channels, of which `final` is for the user. Some servers drop its control tokens.
_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>\s*assistant)?\s*(?:<\|channel\|>)?\s*(?:analysis|commentary|final)\b[^<]*<\|m"
)
_FINAL = re.compile(r"\bfinal\b.{0,60}?<\|message\|>(.*?)(?=<\|(?:end|return|start|channel|call)\|>|\Z)", re.DOTALL)
_BARE_CHANNELS = re.compile(r"\s*analysis(?=[A-Z])(?:.*assistantfinal)?", re.DOTALL)
# A model that does not stop goes on with the next turn. These end a turn in the templates of the open families.
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|end|endoftext|end_of_text|return)\|>|</?(?:start|end)_of_turn>|</s>|<｜end▁of▁sentence｜>"
)
_AROUND = re.compile(r"<\|(?:begin_of_solution|end_of_solution|START_RESPONSE|END_RESPONSE)\|>")
_TAGGED = re.compile(r"\s*<(answer|output|response|result|rewrite)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCED_LINE = re.compile(r"\s*(```+)([^`\n]+)\1\s*\Z")
_FENCED = re.compile(r"\s*(```+|~~~+)[^\n`]*\n(.*?)(?:\n[ \t]*\1|\Z)", re.DOTALL)


def reply_content(reply: str, about: str = "") -> str | None:
    """Return what a reply says without its reasoning; None when the reasoning does not end.

    `about` is the text that the prompt is about. A mark that it holds may be part of what the reply says, so such a
    mark opens reasoning only at the beginning of the reply.
    """
    if _CHANNELS.match(reply):
        finals = _FINAL.findall(reply)
        return _bare(finals[-1], about) if finals else None
    if bare := _BARE_CHANNELS.match(reply):
        return _bare(reply[bare.end() :], about) if bare[0].endswith("final") else None
    kept: list[str] = []
    depth = position = 0
    for mark in _MARK.finditer(reply):
        before = reply[position : mark.start()]
        begins = bool(mark["open"]) and not "".join([*kept, before]).strip()
        if depth == 0 and not begins and mark[0].casefold() in about.casefold():
            continue
        if mark["open"]:
            kept += [before] if depth == 0 else []
            depth += 1
        else:
            # If nothing is open, the prompt has opened it: all that comes before is reasoning.
            kept = kept if depth else []
            depth = max(0, depth - 1)
        position = mark.end()
    return _bare("".join([*kept, reply[position:]]), about) if depth == 0 else None


def open_mark(prompt: str) -> str:
    """Return the mark with which a prompt opens the reasoning of its reply; empty when it opens none."""
    marks = list(_MARK.finditer(prompt))
    return marks[-1][0] if marks and marks[-1]["open"] and not prompt[marks[-1].end() :].strip() else ""


def is_mark(token: str) -> bool:
    """Return whether a token is a mark of reasoning, so that a reply's text needs it."""
    return _MARK.fullmatch(token) is not None or token in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")


def without_fence(text: str) -> str:
    """Return the text inside the code fence with which `text` begins; without a fence, all of it."""
    fenced = _FENCED.match(text) or _FENCED_LINE.match(text)
    return fenced[2] if fenced else text


def _bare(text: str, about: str) -> str:
    """Return a reply without tags around it and without the turns after it."""
    text = _AROUND.sub("", text)
    end = next((end.start() for end in _END_OF_TURN.finditer(text) if end[0] not in about), None)
    text = text[:end]
    tagged = _TAGGED.match(text)
    return tagged[2] if tagged and f"<{tagged[1]}>" not in about else text
