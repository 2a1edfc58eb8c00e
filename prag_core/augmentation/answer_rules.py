"""Rules that find the possible answers in an English sentence, and the words that ask for them in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from prag_core.augmentation.filter import contains_text

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
    r"|Jan\.|Feb\.|Aug\.|Sept\.|Oct\.|Nov\.|Dec\.)"
)
_DATE = rf"(?:\d{{1,2}}(?:st|nd|rd|th)? )?{_MONTH}(?: \d{{1,2}}(?:st|nd|rd|th)?)?(?:,? \d{{4}})?(?!\w)"
_WHEN = re.compile(rf"{_DATE}|(?<![\w,.])\d{{4}}(?!\w)")
_BRACKETS = re.compile(r"\(([^()]*)\)")
_BORN = re.compile(rf"\b(?:born|b\.) (?:on |in )?({_DATE}|\d{{4}})")
_FULL_DATE = re.compile(rf"(?<!\w){_DATE}")
_YEAR = re.compile(r"(?<![\w,.–-])(1[0-9]\d\d|20\d\d)(?![\w,–-]|\.\d)")
_NUMBER = (
    r"(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty"
    r"|thirty|forty|fifty|sixty)(?: (?:hundred|thousand|million|billion))?"
)
_MONEY = re.compile(r"(?:US|A|C)?[$£€¥]\s?\d[\d,.]*\d?(?: (?:million|billion|thousand))?")
_COUNT = re.compile(rf"(?<![\w$£€,.–/-])((?i:{_NUMBER})) ((?:[a-z]+(?:-[a-z]+)* )?)([a-z]+)(?!\w)")
_POPULATION = re.compile(r"\bpopulation (?:of|was|is) (?:about |around )?(\d[\d,.]*\d)(?!\w)")
_PERCENT = re.compile(r"(?<![\w,.])\d+(?:\.\d+)?\s?(?:%|percent|per cent)(?!\w)")
_LENGTHS = r"(?:metres?|meters?|feet|foot|km|kilomet(?:re|er)s|miles?|m|cm|mm|inches|yards)"
_DIMENSION = re.compile(rf"(?<![\w,.])({_NUMBER} {_LENGTHS}) (?:tall|high|long|wide|deep|thick)(?!\w)")
_TIMES = frozenset({"years", "months", "days", "weeks", "hours", "minutes"})

_CAPITAL = r"[^\W\d_a-zß-ÿ][\w'’.-]*\w"
_INITIAL = r"[A-Z]\."
_NAME = re.compile(
    rf"(?<![\w'’]){_CAPITAL}(?: (?:(?:of the|of|de la|de|du|del|von|van|der) )?(?:{_CAPITAL}|{_INITIAL}))*"
)
_QUOTED = re.compile(r"[\"“]([^\"”“]{2,60})[\"”]")

_NO_NAMES = re.compile(
    rf"(?:The|An?|In|On|At|By|For|From|With|Since|After|Before|During|Under|Over|Its|It|He|She|They|His|Her|Their|We"
    rf"|You|I|This|That|These|Those|There|Here|When|While|Where|Who|Which|What|As|And|But|Or|Although|Though|However"
    rf"|If|Also|Some|Many|Most|Both|Each|All|Other|Another|To|Of|Not|No|So|Then|Until|Upon|According|Following"
    rf"|Because|Despite|Today|Later|First|Last|Several|Only|Born|Now|One|Two|Three|Four|Five|Six|Seven|Eight|Nine|Ten"
    rf"|Mr|Mrs|Ms|Dr|Sir|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|{_MONTH})\.?"
)
_PEOPLES = re.compile(r"\A\w*(?:ian|ean|can|ish|ese|ench|erman|utch|reek|wiss)s?\Z")
# Nouns that, as the first or last word of a name, say what kind of thing it names.
_KINDS = re.compile(
    r"\b(?:river|lake|island|bridge|mountain|hill|valley|university|college|school|academy|hospital|church|museum"
    r"|cathedral|theatre|theater|station|airport|street|road|highway|county|province|district|city|town|village"
    r"|kingdom|empire|republic|party|club|band|orchestra|team|league|cup|championship|war|battle|award|prize|festival"
    r"|company|corporation|group|gulf|sea|ocean|bay|desert|forest|park|square|stadium|army|navy|newspaper|magazine)\b"
)
# Words next to a name that do not say what kind of thing it names.
_NO_NOUN = re.compile(
    r"(?:and|or|but|in|of|on|at|by|for|from|to|with|as|than|that|which|who|where|when|while|is|are|was|were|be|been|has"
    r"|have|had|it|he|she|they|after|before|throughout|since|until|over|under|between|into|through|then|also|both|including|not"
    r"|the|an?|his|her|its|their|like|near|via|during|against|about|\w+s|\w+ed|\w+ing|\w+ly)\Z"
)


@dataclass(frozen=True, slots=True)
class AnswerCandidate:
    """A possible answer in a sentence, and the words that, in its place, ask for it.

    `place` is "who", "what place", "what date", "what year", "how much", "how many", "what percentage" or "what".
    The answer begins at the position `start` of the sentence.
    """

    answer: str
    place: str
    sentence: str
    start: int


def find_answers(topic: str, sentences: list[str]) -> list[AnswerCandidate]:
    """Return the possible answers in a passage, the most promising first, each answer once.

    The best answer of every sentence comes before the second best of any sentence.
    """
    by_sentence = [list(_candidates(topic, sentence)) for sentence in sentences]
    found: list[AnswerCandidate] = []
    seen: set[str] = set()
    for rank in range(max(map(len, by_sentence), default=0)):
        for candidates in by_sentence:
            if rank < len(candidates) and candidates[rank].answer.casefold() not in seen:
                seen.add(candidates[rank].answer.casefold())
                found.append(candidates[rank])
    return found


def _candidates(topic: str, sentence: str) -> Iterator[AnswerCandidate]:
    """Yield the answers of a sentence by rank, but none that overlaps a better one or shares a word with the topic."""
    ranked = sorted(_matches(sentence), key=lambda match: (match[0], match[1]))
    taken: list[tuple[int, int]] = []
    for _, start, end, place in ranked:
        answer = sentence[start:end].strip(" ,.")
        overlaps = any(start < other_end and other_start < end for other_start, other_end in taken)
        shared = any(contains_text(topic, word) for word in re.findall(r"[^\W\d]{4,}", answer))
        if overlaps or not answer or shared or contains_text(topic, answer):
            continue
        taken.append((start, end))
        yield AnswerCandidate(answer, place, sentence, sentence.index(answer, start))


_Match = tuple[int, int, int, str]


def _matches(s: str) -> Iterator[_Match]:
    """Yield (rank, start, end, place) of each possible answer in a sentence; a lower rank is better."""
    # 1. Born and died.
    for brackets in _BRACKETS.finditer(s):
        whens = [(brackets.start(1) + m.start(), brackets.start(1) + m.end()) for m in _WHEN.finditer(brackets[1])]
        if whens and "born" in brackets[1]:
            yield 0, *whens[0], "what date"
        elif len(whens) == 2 and re.fullmatch(r"\s*[–-]\s*(?:died )?", s[whens[0][1] : whens[1][0]]):
            yield 0, *whens[0], "what date"
            yield 0, *whens[1], "what date"
    if (born := _BORN.search(s)) and len(s[: born.start()].split()) <= 6:
        yield 0, *born.span(1), "what date"
    # 2. Dates and years.
    for m in _FULL_DATE.finditer(s):
        if re.search(r"\d", m[0]):
            yield 1, *m.span(), "what date"
    for m in _YEAR.finditer(s):
        # In "the 2010 census" or "a 2009 film", the year is not when something happened.
        adjective = re.search(r"\b(?:the|an?|its|his|her|their) \Z", s[: m.start()])
        yield 5 if adjective else 2, *m.span(), "what year"
    # 3. Numbers.
    for m in _DIMENSION.finditer(s):
        yield 1, *m.span(1), "how many"
    for m in _MONEY.finditer(s):
        yield 1, *m.span(), "how much"
    for m in _POPULATION.finditer(s):
        yield 1, *m.span(1), "how many"
    for m in _PERCENT.finditer(s):
        yield 2, *m.span(), "what percentage"
    for m in _COUNT.finditer(s):
        # In "212 steps lead", the first word after the number is the noun and the second is not part of it.
        first, second = m[2].strip(), m[3]
        noun = first if first.endswith("s") or re.fullmatch(_LENGTHS, first) else f"{m[2]}{second}"
        if noun in _TIMES:
            yield 2, m.start(), m.start(2) + len(noun), "how many"
        elif not _YEAR.fullmatch(m[1]) and noun.endswith(("s", "people", "men", "women", "children", "feet")):
            yield 2, *m.span(1), "how many"
    # 4. Names.
    for m in _QUOTED.finditer(s):
        yield 3, *m.span(1), "what"
    for m in _NAME.finditer(s):
        yield from _name_match(s, m.start(), m[0])


def _name_match(s: str, start: int, name: str) -> Iterator[_Match]:
    """Yield the match of a name, with what stands in its place; nothing if it is not a name after all."""
    # 1. Drop first words that are capitalized but not part of a name, then what is left if it cannot be a name.
    while name and _NO_NAMES.fullmatch(first := name.split(" ", 1)[0]):
        name = name[len(first) + 1 :]
        start += len(first) + 1
    name = re.sub(r"['’]s?\Z", "", name)
    words = name.split()
    before, after = s[:start], s[start + len(name) :]
    in_brackets = before.count("(") > before.count(")")
    if not words or in_brackets or _PEOPLES.match(words[-1]) or re.fullmatch(r"(?:[A-Z]\.)+[A-Z]?", name):
        return
    if len(words) == 1 and (len(name) < 3 or not before.strip(' "“(')):
        return
    # 2. Find the kind of thing that it names, by its own words or the words around it.
    end = start + len(name)
    kind = _KINDS.search(words[-1].lower()) or _KINDS.search(words[0].lower())
    noun_before = re.search(r"\b([a-z]{3,}) \Z", before)
    noun_of = re.search(r"\b(?:the|an?) (?:\w+ )?([a-z]+) of (?:the )?\Z", before)
    noun_after = re.match(r" ([a-z]{3,})", after) if before.endswith(("the ", "The ")) else None
    who_or_what = "who" if len(words) in (2, 3) else "what"
    if kind:
        yield 3, start, end, "what"
    elif noun_before and not _NO_NOUN.match(noun_before[1]):
        yield 2, start, end, "what"
    elif re.search(r"\bby \Z", before):
        yield 2, start, end, "who"
    elif (
        (noun_of and not _NO_NOUN.match(noun_of[1]))
        or (noun_after and not _NO_NOUN.match(noun_after[1]))
        or re.search(r"\b(?:named|called|as) \Z", before)
    ):
        yield 3, start, end, "what"
    elif re.search(r"\b(?:in|at|near|from|to) (?:the )?\Z", before):
        yield 3, start, end, "what place"
    elif re.search(r"[a-z], \Z", before):
        yield 3, start, end, who_or_what
    else:
        yield 4, start, end, who_or_what
