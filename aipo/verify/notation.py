r"""The outer notation of an answer: lists, tuples, sets, intervals, equations, matrices, units, words.

:func:`read` takes a tidy answer (:func:`aipo.verify.answers.tidy`) apart into nodes, as text and without sympy; the
innermost ones are single expressions. It knows what Math-Verify 0.9 confuses: units and percent, bases, intervals and
tuples, names and values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from aipo.verify.answers import Number, number
from aipo.verify.units import compound, split_unit
from aipo.verify.wording import condition, meaning

MAX_DEPTH = 16  # of brackets; deeper ones cost the parser seconds


class Unreadable(Exception):
    """This text is no mathematics that we know."""


@dataclass(frozen=True)
class Value:
    """One expression; ``unit`` in one spelling, "" without one ("%" and "deg" are units).

    ``algebra`` is the text with a unit that may also be variables (2 h); ``letter`` is one that is any integer.
    """

    text: str
    unit: str = ""
    algebra: str = ""
    letter: str = ""

    @property
    def number(self) -> Number | None:
        return number(self.text)


@dataclass(frozen=True)
class Words:
    text: str  # letters and digits in lower case
    loose: str = ""  # as written if not in \text{}: may also be a product of variables


@dataclass(frozen=True)
class Many:
    kind: str  # list; set: {}; tuple: (); square: []; ratio: 1:2:3
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Range:
    """A set that is not listed: interval with its brackets, union, both, either, without; or R, Z, N, empty."""

    kind: str
    parts: tuple[Node, ...] = ()
    brackets: str = ""


@dataclass(frozen=True)
class Relation:
    """difference = 0, > 0 or >= 0; ``right`` is the right-hand side of an equation."""

    operator: str
    difference: str
    right: str | None = None


@dataclass(frozen=True)
class Named:
    """x = value, f(x) = value, x in set; ``relation`` if it is also an equation in x."""

    name: str
    value: Node
    relation: Relation | None = None

    @property
    def kind(self) -> str:
        if self.name == "y" or re.match(r"\\(?:sin|cos|tan|cot|sec|csc|frac\{(?:[A-Z\[|]|\\overline))", self.name):
            return "y" if self.name == "y" else "name"
        return "function" if re.search(r".[('{]", self.name) else "name"

    @property
    def letter(self) -> str:
        """y of y(x)."""
        return self.name if "\\" in self.name else self.name.partition("(")[0]


@dataclass(frozen=True)
class Based:
    """Digits in a base; without one they are another number."""

    digits: str
    base: str


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


Node = Value | Words | Many | Range | Relation | Named | Based | Matrix

# --- splitting ----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\end"}


def split(text: str, separators: set[str]) -> tuple[list[str], list[str]]:
    """Parts and the separators between them, outside of all brackets. Raises Unreadable if those do not match."""
    parts, found, depth = [""], [], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if not 0 <= depth <= MAX_DEPTH:
            raise Unreadable
        if depth == 0 and token in separators:
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    if depth:
        raise Unreadable
    return [part.strip() for part in parts], found


def _inside(text: str) -> tuple[str, str, str] | None:
    """Opening, inside, closing if one pair of brackets holds all of ``text``."""
    tokens, depth = _TOKEN.findall(text), 0
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[-1] not in _CLOSING:
        return None
    for index, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and index < len(tokens) - 1:
            return None
    return (tokens[0], "".join(tokens[1:-1]).strip(), tokens[-1]) if depth == 0 else None


# --- reading, from the outside in ---------------------------------------------------------------------------------

_CONNECTIVE = re.compile(r"(\\text ?\{)? ?,?(?<![A-Za-z])(and|or)(?![A-Za-z]) ?(?(1)\})|(\\text ?\{[^{}]*\})")
_AND_INSIDE = re.compile(r"\\text ?\{([^{}]*[^{}\s]),? (and|or) ?\}")  # 3 \text{ boys and } 5 \text{ girls}
_EXCEPT = re.compile(
    r"(?:\\text ?\{ ?)?[Aa]ll real numbers,? ?(?:x )?(?:except|but)(?: for)?(?: x ?=)?(?: ?\})? ?([^{}]+)\}?"
)
_CONGRUENT = re.compile(
    r"([a-z]) ?\\equiv ([^,]+?) ?\(?(?:\\[pb]?mod|\\text ?\{ ?mod ?\}|mod)(?![a-z]) ?(?:\{ ?(\d+) ?\}|(\d+))\)?"
)
_RATIO = re.compile(r"(\d+) ?(?:\\text ?\{ ?to ?\}|(?<!\\)to) ?(?=\d)")
_UNIT_VECTOR = re.compile(
    r"\\(?:text|hat|vec) ?\{ ?(?:\\(?:text|hat|vec) ?\{? ?)?([ijk]) ?\}(?: ?\})?|\\(?:text|hat|vec) ([ijk])(?![A-Za-z])"
)
_POINT = re.compile(r"([A-Z]'?) ?(?=\()")
_BRACKET = re.compile(r"[(\[]|\\[{l]|, ")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_POSITIVE = re.compile(r"\\mathbb\{R\} ?(?:\^ ?\{? ?\+ ?\}?|_ ?\{ ?> ?0 ?\})(?:\^\+)?")
_ABSOLUTE, _LETTER = re.compile(r"\|([^|]*)\|"), re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_NOUN = re.compile(r"\d+ ?\\text ?\{ ?([a-z ]+) ?\}")
_RELATIONS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx"}
_SETS = {r"\mathbb{R}": "R", r"\mathbb{Z}": "Z", r"\mathbb{N}": "N", r"\emptyset": "empty", r"\{\}": "empty"}
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|varphi|psi|omega|Omega|Delta|sigma|tau|rho|eta|xi"
_SYMBOL = rf"(?:(?![ei](?![\w_]))[A-Za-z]|\\(?:{_GREEK}))'*(?: ?_ ?(?:\w|\{{[^{{}}]*\}}))?'*"
_D = r"\{(?:d|\\text ?\{d\})[^{}]*(?:\{\d\}[^{}]*)?\}"  # of dy/dx
_SIZE = r"(?:[A-Z]{2}|\|[A-Z]{2}\||\[[A-Z]+\]|\\(?:overline|text) ?\{[A-Z]{2}\})"  # AB, [ABC]
_NAME = re.compile(
    rf"{_SYMBOL}|(?![xyz])[A-Za-z](?:\^\{{-1\}}|'|_\w)* ?\([\w, ]*\)|\( ?{_SYMBOL}(?: ?, ?{_SYMBOL})* ?\)"
    rf"|([xyz]) ?\( ?(?!\1)[xtsun] ?\)|\\frac ?\{{ ?{_SIZE} ?\}} ?\{{ ?{_SIZE} ?\}}|{_SIZE}(?:/{_SIZE}|\^\{{2\}})"
    rf"|\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{{2\}})? ?\(?(?:\\angle ?[A-Z]{{1,3}}|[A-Z]{{3}}|{_SYMBOL})\)?"
    rf"|\|[zwuv]\||\|?\|\\(?:vec|text) ?\{{[a-z]\}}\|\|?"
    rf"|\\frac ?{_D} ?{_D}|\\(?:lim|int|sum|prod|det)(?![A-Za-z]).*|P\([^()]*\)"
    r"|\|?[A-Z]{2,}\|?|m?\\(?:angle|triangle|text|overline|vec|hat) ?\{?[\w ]*\}?|\[[A-Z]+\]"
)


@lru_cache(maxsize=4096)  # the rollouts of one question share their gold
def read(text: str) -> Node:
    """A tidy answer as a node. Raises Unreadable."""
    if amount := compound(text):
        return Value(*amount)
    words = {"and": r" \land ", "or": r" \lor "}
    text = _AND_INSIDE.sub(r"\\text{\1} \2 ", text)
    text = _CONNECTIVE.sub(lambda match: words.get(match.group(2), match.group()), text).rstrip(" .,;").lstrip()
    if number(text):
        return Value(text)
    text, letter = condition(text)
    if letter:
        return _any_integer(read(text), letter)
    if match := _EXCEPT.fullmatch(text):
        return Range("without", (Range("R"), read(match.group(1))))
    if match := _CONGRUENT.fullmatch(text):  # n = 1 mod 3 says n = 3k + 1
        name, rest, *modulus = match.groups()
        letter = "k" if name != "k" else "m"
        return Named(name, Value(f"{''.join(filter(None, modulus))}{letter}+{rest}", letter=letter))
    text = _RATIO.sub(r"\1:", text)
    if not _BRACKET.search(text):
        text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)  # 1,500\pi
    if label := re.fullmatch(r"\\text ?\{([^{}]*)\}", text):  # \text{7 apples}, \text{A and D}
        labels = re.split(r",? (?:and|or) |,", label.group(1).strip())
        if labels[0][:1].isdigit():
            return read(label.group(1))
        if len(labels) > 1:
            return Many("list", tuple(read(rf"\text{{{part}}}") for part in labels))
    alternatives, _ = split(text, {r"\lor", ";"})
    if len(alternatives) > 1:
        return _join([read(part) for part in alternatives if part], "union")
    parts, _ = split(text, {",", r"\land"})
    if len(parts) > 1:
        nouns = {match.group(1) for match in map(_NOUN.fullmatch, parts) if match and not split_unit(match.group())[1]}
        if len(nouns) == len(parts):  # 3 boys, 5 girls
            return Many("tuple", tuple(map(_relation, parts)))
        return _join([_relation(part) for part in parts if part], "either")
    return _relation(text)


def _any_integer(node: Node, letter: str) -> Node:
    r"""k\pi with k in Z: the letter does not matter. f(k) = k + 1 is no such set."""
    match node:
        case Value():
            return replace(node, letter=letter)
        case Many():
            return replace(node, items=tuple(_any_integer(item, letter) for item in node.items))
        case Named() if letter not in node.name:
            return replace(node, value=_any_integer(node.value, letter))
    return node


def _join(nodes: list[Node], kind: str) -> Node:
    names = {node.name if isinstance(node, Named) and isinstance(node.value, Range) else None for node in nodes}
    if len(names) == 1 and None not in names:  # x < 1 or x > 3
        return Range(kind, tuple(node.value for node in nodes if isinstance(node, Named)))
    lists = [isinstance(node, Many) and node.kind == "list" and len(node.items) > 1 for node in nodes]
    if kind == "union" and all(lists):  # x = 1, y = 2 or x = 2, y = 1
        return Many("list", tuple(Many("tuple", node.items) for node in nodes if isinstance(node, Many)))
    items: list[Node] = []
    for node in nodes:
        items += node.items if isinstance(node, Many) and node.kind == "list" else [node]
    return Many("list", tuple(items)) if len(items) != 1 else items[0]


def _relation(text: str) -> Node:
    parts, operators = split(text, _RELATIONS)
    if not operators:
        return _union(text)
    if "" in parts:
        raise Unreadable
    if r"\approx" in operators:  # 1/3 \approx 0.33 says 1/3, x \approx 0.33 says 0.33
        where = operators.index(r"\approx")
        exact, rounded = number(parts[where]), number(parts[where + 1])
        if exact and rounded and abs(exact.value - rounded.value) > abs(exact.value) / 20:
            raise Unreadable
        left = " ".join(part + " " + op for part, op in zip(parts[:where], operators)) + " " + parts[where]
        return _relation(parts[where + 1]) if where == 0 and _NAME.fullmatch(parts[0]) else _relation(left)
    first, last = parts[0], parts[-1]
    named = _NAME.fullmatch(first)
    if set(operators) <= {"=", r"\in"}:
        if r"\in" not in operators and (values := _assigned(first, last) or _assigned(last, first)):
            return values
        equation = Relation("=", f"({first})-({last})", last)
        if named:
            return _name(first, read(last), equation)
        if len(parts) == 2 and _NAME.fullmatch(last):
            return _name(last, read(first), equation)
        if r"\in" in operators:
            raise Unreadable
        return equation
    if operators == [r"\neq"] and named:
        return _name(first, Range("without", (Range("R"), read(last))), None)
    if len(parts) == 2 and (inner := _ABSOLUTE.fullmatch(first)) and len(set(_LETTER.findall(first))) == 1:
        below, inside = operators[0] in ("<", r"\leq"), inner.group(1)  # |x - 2| < 3, |x| > 1
        if below:
            return _relation(f"-({last}) {operators[0]} {inside} {operators[0]} {last}")
        return Range(
            "union", (_inequality(inside, operators[0], last), _inequality(f"-({last})", operators[0], inside))
        )
    bounds = [_bound(left, op, right) for left, op, right in zip(parts, operators, parts[1:])]
    known = [bound for bound in bounds if bound is not None]
    if len(known) == len(bounds) and len({bound.name for bound in known}) == 1:
        ranges = tuple(bound.value for bound in known)
        if len(ranges) > 1:
            return Named(known[0].name, Range("both", ranges))
        return Named(known[0].name, ranges[0], _inequality(first, operators[0], last))
    if r"\neq" in operators or r"\in" in operators or "=" in operators:
        raise Unreadable
    links = tuple(map(_inequality, parts, operators, parts[1:]))
    return links[0] if len(links) == 1 else Range("both", links)


def _inequality(left: str, operator: str, right: str) -> Relation:
    if operator in ("<", r"\leq"):
        left, right = right, left
    return Relation(">" if operator in "<>" else ">=", f"({left})-({right})")


def _name(name: str, value: Node, relation: Relation | None) -> Node:
    name = name.replace(" ", "")
    if isinstance(value, Many) and value.kind == "list":  # x = 1 \pm 2
        return Many("list", tuple(Named(name, item) for item in value.items))
    return Named(name, value, relation)


def _assigned(names: str, values: str) -> Node | None:
    """(x, y) = (1, 2) as x = 1, y = 2."""
    left, right = _components(names), _components(values)
    if len(left) != len(right) or len(left) < 2 or not all(map(_NAME.fullmatch, left)):
        return None
    nodes = tuple(_relation(f"{name} = {value}") for name, value in zip(left, right))
    return Many("tuple", nodes) if all(isinstance(node, Named) for node in nodes) else None


def _components(text: str) -> list[str]:
    whole = _inside(text)
    return split(whole[1], {","})[0] if whole and (whole[0], whole[2]) == ("(", ")") else []


def _bound(left: str, operator: str, right: str) -> Named | None:
    """An inequality between an unknown and a value as a range of the unknown."""
    strict, below = operator in "<>", operator in ("<", r"\leq")
    if _NAME.fullmatch(right) and not _NAME.fullmatch(left):
        left, right, below = right, left, not below
    if not _NAME.fullmatch(left) or _NAME.fullmatch(right):
        return None
    infinity, value = Value(r"-\infty" if below else r"\infty"), read(right)
    if not isinstance(value, Value):
        raise Unreadable
    side = "(" if strict else "["
    if below:
        return Named(left, Range("interval", (infinity, value), "(" + {"(": ")", "[": "]"}[side]))
    return Named(left, Range("interval", (value, infinity), side + ")"))


def _union(text: str) -> Node:
    parts, operators = split(text, {r"\cup", r"\cap", r"\setminus"})
    if "" in parts and operators:
        raise Unreadable
    node = _group(parts[0])
    for operator, part in zip(operators, parts[1:]):
        kind = {r"\cup": "union", r"\cap": "both", r"\setminus": "without"}[operator]
        node = Range(kind, (node, _group(part)))
    return node


def _group(text: str) -> Node:
    if kind := _SETS.get(text.replace(" ", "")):
        return Range(kind)
    if _POSITIVE.fullmatch(text):
        return Range("interval", (Value("0"), Value(r"\infty")), "()")
    if text.startswith(r"\begin") and (matrix := _matrix(text)):
        return matrix
    vectors = {a or b for a, b in _UNIT_VECTOR.findall(text)}
    if vectors & {"j", "k"}:  # components: 3i + 4j at i = 1, j = 0 and at i = 0, j = 1
        return Many(
            "tuple", tuple(map(_single, (_at_unit(text, axis) for axis in ("ijk" if "k" in vectors else "ij"))))
        )
    if (point := _POINT.match(text)) and (whole := _inside(text[point.end() :])) and "," in whole[1]:  # P(1, 2)
        return Named(point.group(1), _group(text[point.end() :]))
    if len(ratio := split(text, {":"})[0]) > 2:
        return Many("ratio", tuple(map(_single, ratio)))
    whole = _inside(text)
    if text.startswith(r"\text") and (styled := _inside(text[5:].strip())) and "\\" in styled[1]:
        return read(styled[1])  # \mathbf{\frac{1}{2}}
    if whole is None:
        if r"\pm" in text or r"\mp" in text:
            plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
            minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
            return Many("list", (_group(plus.removeprefix("+").strip()), _group(minus)))
        return _single(text)
    opening, content, closing = whole
    if opening == "{":
        return read(content)
    if opening == r"\{":
        described, _ = split(content, {"|", ":"})
        if len(described) == 2 and split(described[1], _RELATIONS)[1]:  # {x | x > 1}
            return read(described[1])
        node = read(re.sub(r"(?<=\d),(?=\d)", ", ", content))  # {100,200} are two
        return Many("set", node.items if isinstance(node, Many) and node.kind == "list" else (node,))
    parts, _ = split(content, {",", ";"})
    if len(parts) == 1:
        return read(content)
    items = tuple(read(part) for part in parts)
    if (opening, closing) in (("(", "]"), ("[", ")")):
        if len(items) != 2:
            raise Unreadable
        return Range("interval", items, opening + closing)
    return Many("square" if opening == "[" else "tuple", items)


def _at_unit(text: str, axis: str) -> str:
    def value(match: re.Match[str]) -> str:
        behind = re.search(r"[\w)}] ?$", text[: match.start()])
        return (r"\cdot " if behind else "") + str(int(axis in match.groups()))

    return _UNIT_VECTOR.sub(value, text)


_ENVIRONMENT = re.compile(r"\\begin ?\{([a-zB]+)\}(?: ?\{[clr|]*\})? ?(.*?) ?\\end ?\{\1\}")


def _matrix(text: str) -> Node | None:
    match = _ENVIRONMENT.fullmatch(text)
    if not match or match.group(1) in ("vmatrix", "Vmatrix") or r"\begin" in match.group(2):
        return None
    rows = [row.strip() for row in re.split(r"\\cr(?: ?\[[^\]]*\])?(?![A-Za-z])", match.group(2)) if row.strip()]
    if match.group(1) == "cases":
        return _join([read(row.replace("&", "")) for row in rows], "either")
    cells = tuple(tuple(read(cell) for cell in row.split("&")) for row in rows)
    if not cells or len({len(row) for row in cells}) > 1:
        raise Unreadable
    return Matrix(cells)


# --- words, bases, values -----------------------------------------------------------------------------------------

_BASED = re.compile(r"\(?([0-9A-F]*[0-9][0-9A-F]*)\)? ?(?:_ ?\{? ?\(?(?:base )?(\w+)\)? ?\}?|\(?(?:in )?base (\w+)\)?)")
_VARIABLE = re.compile(r"[\d}](?: [A-Za-z]| ?\\text ?\{ ?[AK] ?\})(?: ?\^ ?\S+)?$")
_WORDS = re.compile(r"\(?(?:(?:an?|the) )?([A-Za-z][A-Za-z0-9 '.,!?()-]*)", re.IGNORECASE)


def _single(text: str) -> Node:
    if not text:
        raise Unreadable
    plain = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text).split())
    if match := _BASED.fullmatch(plain):
        base = match.group(2) or match.group(3)
        base = meaning(base.lower())
        return Value(match.group(1)) if base == "10" else Based(match.group(1).lstrip("0"), base)
    if (match := _WORDS.fullmatch(plain)) and (r"\text" in text or re.search("[A-Za-z]{2}", plain)):
        letters = meaning(re.sub("[^a-z0-9]", "", match.group(1).lower()))
        if kind := _SETS.get(letters):
            return Range(kind)
        if number(letters):
            return Value(letters)
        return Words(letters, plain if r"\text" not in text and len(letters) <= 4 else "")
    value, unit = split_unit(text)
    return Value(value, unit, text if unit and _VARIABLE.search(text) else "")
