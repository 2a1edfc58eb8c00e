"""What a model's reply says, without what surrounds it: reasoning before it, tags and a code fence around it.

Endpoints with a parser for reasoning return it in a field of its own. Others, and the local model, return it in the
text, each family of models with its own marks.
"""

from __future__ import annotations

import re

_TAGS = (
    r"(?:[\w-]+[_:-])?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|monologue|scratch_?pad|plan"
    r"|planning|details)(?:[_:-][\w-]+)?"
)
_MARK = re.compile(
    rf"(?P<open>(?:<|&lt;)(?:{_TAGS})(?:\s[^<>]*)?(?<!/)(?:>|&gt;)|\[THINK\]|<\|(?:begin_of_thought|START_THINKING)\|>|◁think▷|<\|channel>)"
    rf"|(?:<|&lt;)/(?:{_TAGS})\s*(?:>|&gt;)|\[/THINK\]|<\|(?:end_of_thought|END_THINKING)\|>|◁/think▷|<channel\|>",
    re.IGNORECASE,
)
# The form of gpt-oss: messages in channels, of which `final` is for the user. Some servers drop its control tokens.
_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>\s*assistant)?\s*(?:<\|channel\|>)?\s*(?:analysis|commentary|final)\b[^<]*<\|m"
)
_FINAL = re.compile(
    r"\bfinal\b(?:(?!<\|(?:end|start|channel)\|>).){0,60}?<\|message\|>(.*?)"
    r"(?=<\|(?:end|return|start|channel|call)\|>|\Z)",
    re.DOTALL,
)
_BARE_CHANNELS = re.compile(
    r"\s*(?:assistant\s*)?(?:analysis|commentary) ?(?=[A-Z])(?:.*assistant\s*final)?", re.DOTALL
)
# Headings or fences in place of marks, as of Granite and Apriel: reasoning under one, the reply under another.
_HEADED = re.compile(
    r"\s*(?:[#*\s]*(?:here (?:is|are) my )?(?:thought process|(?:chain of )?thoughts?|thinking|reasoning)"
    r"(?: process| steps)?[*\s]*(?::|\n)|(?P<fence>```+|~~~+)(?:think|thought|reason)\w*\n)",
    re.IGNORECASE,
)
_REPLY_HEAD = re.compile(
    r"^[#*\s]*(?:here is (?:my|the) |my |the )?(?:final )?(?:response|answer|output|reply"
    r"|re-?writ\w*|rephras\w*|paraphras\w*)(?: (?:passage|text|version))?[*\s]*(?::[*\s]*|\n)|\[BEGIN FINAL RESPONSE\]",
    re.IGNORECASE | re.MULTILINE,
)
# A fence, a JSON array or a line "Q: …" needs no heading.
_REPLY_START = re.compile(r"^(?=```|~~~|\[\s*\{|\W*Q\w*\W*:)", re.MULTILINE | re.IGNORECASE)
# A model that does not stop goes on with the next turn. These end a turn in the templates of the open families.
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|end|endoftext|end_of_text|return|endofturn|start_header_id|start_of_role|user)\|>"
    r"|<\|(?:START|END)_OF_TURN_TOKEN\|>|</?(?:start|end)_of_turn>|</s>|<｜end▁of▁sentence｜>|<｜User｜>"
    r"|\[\|(?:endofturn|user)\|\]|\[/?INST\]|\[END FINAL RESPONSE\]"
    r"|\n\s*(?:###\s*(?:Instruction|Input|User)\b|(?:User|Human): )"
)
_AROUND = re.compile(
    r"<\|(?:(?:begin|end)_of_(?:solution|box)|(?:START|END)_RESPONSE|assistant)\|>|<｜Assistant｜>|\[\|assistant\|\]"
)
_TAGGED = re.compile(
    r"<((?:final_)?(?:answer|output|response|result|conclusion|rewrite|rewritten\w*)|paraphrase\w*)>(.*?)(?:</\1>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
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
    if (head := _HEADED.match(reply)) and head[0].strip() not in about:
        return _after_heading(reply, head, about)
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


def _after_heading(reply: str, head: re.Match[str], about: str) -> str | None:
    """Return what follows the reasoning that `head` opens: what needs no heading, or the text under the last one."""
    if head["fence"]:
        found = re.compile(rf"^{head['fence']}[ \t]*(?:\n|\Z)", re.MULTILINE).search(reply, head.end())
    else:
        heads = [match for match in _REPLY_HEAD.finditer(reply, head.end()) if match[0].strip("#*: \n") not in about]
        found = _REPLY_START.search(reply, head.end()) or (heads[-1] if heads else None)
    return _bare(reply[found.end() :], about) if found else None


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
    tagged = _TAGGED.search(text)
    return tagged[2] if tagged and f"<{tagged[1]}>" not in about else text
