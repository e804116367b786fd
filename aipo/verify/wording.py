r"""What a sentence says around an answer: labels in front, conditions behind, words that stand for mathematics.

Only what leaves a complete answer is taken away; what hedges ("not", "about") or names alternatives stays, and is then
no mathematics. Text only.
"""

from __future__ import annotations

import re

_HEDGES = r"(?i:not|cannot|or|either|neither|about|approximately|around|nearly|between|than|maybe|at (?:least|most))"
_PLAIN = rf"(?:(?!{_HEDGES}(?![A-Za-z])|[A-Za-z]{{1,9}}n't)(?<![A-Za-z])[A-Za-z'-]++[ ,]*+)"
_IS = r"(?:(?:is|are|equals|be)(?: equal to)?:?|:)"
_SAID = [
    re.compile(pattern)
    for pattern in (
        r"(?:\\text ?\{ ?)?(?:[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o|[Tt]hen)(?![A-Za-z]),? ?\}?,? ?(?=\S)",
        rf"\\text ?\{{ ?{_PLAIN}{{1,20}}?{_IS} ?\}} ?:?(?=\S)",
        rf"(?:\\text ?\{{ ?{_PLAIN}{{1,20}}?\}} ?)?[^\\{{}}=<>,]{{0,20}}\\text ?\{{ ?{_IS} ?\}} ?(?=\S)",
        rf"{_PLAIN}{{1,20}}?(?<=[a-z] ){_IS} (?=\S)|[A-Za-z ]{{3,30}}: (?=\S)",
        r"\\text ?\{ ?[A-Za-z' ]{2,40} ?\} ?(?::|\\text ?\{ ?: ?\}) ?(?=\S)",
        rf"\\text ?\{{ ?(?!(?i:{_HEDGES})\b)[A-Za-z ]{{4,30}}\}} ?(?=\([^()]*,[^()]*\)$)",  # \text{Vertex } (1, 2)
        r"(?:\\text ?\{ ?)?(?:[Oo]ption|[Cc]hoice|[Aa]nswer) ?\}? ?(?=(?:\\text ?\{)? ?\(?[A-Z]\)?\}?$)",
    )
]
_HOPE = re.compile(r"[. ]*I hope (?:it|this) is correct.*$")

# ", k \in \mathbb{Z}", "(n \in \mathbb{Z})", "where k is any integer", "for all real x": says nothing of the value
_SYMBOLS = r"(?:(?:(?:\\[a-z]{2,8}+|[A-Za-z])(?![a-z])(?:_\w)? ?(?:,|and)? ?){1,4})"
_KIND = r"(?:an?|any|all|every|each|some|arbitrary|real|positive|non-?negative|non-?zero|natural|fixed|constants?"
_KIND += r"|integers?|numbers?|values?|reals?|of)"
_IN = r"(?: ?\\in ?\\[A-Z](?: ?[\^_] ?[+*\d]| ?_ ?(?:>|\\geq) ?0)?)"
_TAIL = re.compile(
    rf"(?:for|where|with|as)(?: {_KIND}){{0,8}} {_SYMBOLS}(?: ?{_IN}| ?(?:is|are|being|an|any)(?: {_KIND}){{1,8}})?"
    rf"|(?:for|where|with)(?: {_KIND}){{1,8}}|{_SYMBOLS}{_IN}|[A-Za-z] is(?: {_KIND}){{1,8}}"
)
LONGEST = 120  # of a condition, in characters
_WHERE = re.compile(
    r"(?:, ?| |\(|(?=\\text))(?:\\text ?\{ ?[,(]? ?)?"
    r"(?=(?:for|where|with|as) |[a-z] ?\\in(?![a-z])|[a-z] ?(?:\\text ?\{ ?)?is )"
)

_NONE = re.compile(
    r"(?:thereis|thereare|(?:the)?(?:equation|system|inequality)has)?no(?:real|such|integer|valid)?"
    r"(?:solution|root|zero|number|value|function|intersection)s?(?:exists?)?|none|(?:the)?emptyset"
)
_REALS = re.compile(
    r"(?:for)?(?:all|any|every)(?:real)?(?:reals?|realnumbers?|values?)(?:(?:of)?[a-z])?|allreals?[a-z]?|(?:the)?realnumbers"
)
_SYNONYMS = {
    "dne": "doesnotexist", "limitdoesnotexist": "doesnotexist", "thelimitdoesnotexist": "doesnotexist",
    "infinitesolutions": "infinitelymany", "infinitelymanysolutions": "infinitelymany", "infinite": "infinitelymany",
}  # fmt: skip
_NUMERALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
_ONES, _TENS = _NUMERALS.split()[:20], _NUMERALS.split()[20:]
_NUMBERS = {word: str(value) for value, word in enumerate(_ONES)} | {
    ten + (one if value else ""): str(10 * tens + value)
    for tens, ten in enumerate(_TENS, start=2)
    for value, one in enumerate(_ONES[:10])
}
_NUMBERS |= {"half": "1/2", "onehalf": "1/2", "onethird": "1/3", "onequarter": "1/4", "onefourth": "1/4"}
_NUMBERS |= {sign + word: "-" + value for word, value in _NUMBERS.items() for sign in ("minus", "negative")}


def plain_words(text: str) -> str:
    r"""Without what a sentence says in front: "The area is 25. I hope it is correct", "\text{Vertex: } (1, 2)"."""
    text = _HOPE.sub("", text)
    whole = re.fullmatch(r"\\text ?\{([^{}]*)\}", text)
    rest = whole.group(1).strip() if whole else text
    for pattern in _SAID:
        if match := pattern.match(rest):
            rest = rest[match.end() :]
    return text if whole and rest == whole.group(1).strip() else rest


def condition(text: str) -> tuple[str, str]:
    r"""``(rest, letter)``: without a condition at the end that restricts nothing; its letter if it is any integer."""
    for match in _WHERE.finditer(text, max(0, len(text) - LONGEST)):
        tail = re.sub(r"\\mathbb ?\{([A-Z])\}", r"\\\1", text[match.end() :])
        tail = " ".join(re.sub(r"\\text(?![a-z])|[{}()$]", " ", tail).split())
        if match.start() and _TAIL.fullmatch(tail):
            whole = re.search(r"\\Z$|^(?!.*(?:positive|negative|zero)).*integer", tail)
            letter = re.search(r"(?<![A-Za-z\\])[b-z](?![A-Za-z])", tail)
            return text[: match.start()].rstrip(" ,;("), letter.group() if whole and letter else ""
    return text, ""


def meaning(words: str) -> str:
    r"""Letters and digits in lower case as what they stand for: \emptyset, \mathbb{R}, a number, or words."""
    if _NONE.fullmatch(words):
        return r"\emptyset"
    if _REALS.fullmatch(words):
        return r"\mathbb{R}"
    return _NUMBERS.get(words) or _SYNONYMS.get(words, words)
