r"""Are two answers mathematically equal? Runs in a worker process, never in the trainer: answers are hostile.

Answers are taken apart by their outer notation (:mod:`aipo.verify.notation`) and compared part by part, down to single
expressions (:mod:`aipo.verify.expressions`). What Math-Verify 0.9 gets wrong is decided on the way: percent, units,
bases, tuples against sets, names against values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from typing import Any

import sympy
from sympy import FiniteSet, Intersection, Interval, Set, Symbol, Union

from aipo.verify.answers import normal_form, same_number, settle, tidy
from aipo.verify.expressions import approximate, expression, proportional, same_expression
from aipo.verify.notation import Based, Many, Matrix, Named, Node, Range, Relation, Unreadable, Value, Words, read
from aipo.verify.sampling import has_steps
from aipo.verify.units import conversion
from aipo.verify.wording import plain_words

_CHOICE = re.compile(  # (B) 25 says B, and 25
    r"(?:\\text ?\{ ?\(([A-E])\)[.:]? ?\} ?|\(([A-E])\) )((?:(?!\\text|\\l?or|\bor\b|and|[,;]).)+)"
)
_ONE_TEXT = re.compile(r"^\\text ?\{ ?([^{}]*[^{} ]) ?\}$")
_E = re.compile(r"-?\d+e[+-]\d+")


def equal(gold: str, answer: str) -> bool:
    """Whether two bare answers are equal. Raises whatever sympy raises on nonsense, MemoryError included."""
    settled = settle(gold, answer)
    if settled is not None:
        return settled
    gold, answer = plain_words(tidy(gold)), plain_words(tidy(answer))
    golds, answers = _readings(gold), _readings(answer)
    if len(golds) == len(answers) == 3:  # letter and value, each
        return golds[1] == answers[1] and _any_same(golds[2:], answers[2:])
    return _any_same(golds, answers)


def _any_same(golds: list[str], answers: list[str]) -> bool:
    for gold in golds:
        for answer in answers:
            with suppress(Unreadable):
                if same(read(gold), read(answer)):
                    return True
    return False


def _readings(text: str) -> list[str]:
    """(B) 25 says B, and 25; 2e-1 may be a number, or 2e - 1."""
    if match := _CHOICE.fullmatch(_ONE_TEXT.sub(r"\1", text)):
        return [text, match.group(1) or match.group(2), match.group(3)]
    return [text, text.replace("e", " e ")] if _E.fullmatch(text) else [text]


def same(gold: Node, answer: Node) -> bool:
    """Whether an answer says what the gold answer says. Not symmetric: a + b = 5 answers 5, but 5 not a + b = 5."""
    match gold, answer:
        case Named(), Named():
            # y = 2x + 1 and f(x) = 2x + 1 are the same function; x = 3 and y = 3 are different answers
            if gold.letter == answer.letter or {gold.kind, answer.kind} in ({"function"}, {"function", "y"}):
                return same(gold.value, answer.value) or _same_count(gold, answer)
            return _same_relation(gold.relation, answer.relation)
        case Named(), Relation():
            return _same_relation(gold.relation, answer)
        case Relation(), Named():
            return _same_relation(gold, answer.relation)
        case Relation(), Relation():
            return _same_relation(gold, answer)
        case (Relation(">" | ">="), Range() | Many("tuple" | "square")) | (Range(), Relation(">" | ">=")):
            return _same_set(_as_set(gold), _as_set(answer))
        case Relation(), _:
            return False  # x + y = 1 is more than 1
        case Named(), _:
            return same(gold.value, answer) or _same_count(gold, answer)
        case _, Named():
            return same(gold, answer.value) or _same_count(gold, answer)
        case _, Relation():  # a + b = 5 for 5; but x^2 - 1 = 0 does not say that something is 0
            return answer.right not in (None, "0") and same(gold, read(answer.right or ""))
        case Based(), Based():
            return gold == answer
        case (Based(), _) | (_, Based()):
            return False
    if isinstance(gold, Range) or isinstance(answer, Range):
        return _same_set(_as_set(gold), _as_set(answer))
    if isinstance(gold, Many) or isinstance(answer, Many):
        return _same_many(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _same_words(gold, answer)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return len(gold.rows) == len(answer.rows) and all(map(_in_order, gold.rows, answer.rows))
    return _same_value(gold, answer)


def _same_count(gold: Node, answer: Node) -> bool:
    """C(10, 3) and P(5, 2) may be points, or numbers."""
    match gold, answer:
        case Named("C" | "P", Many("tuple", (Value(n), Value(k)))), _ if n.isdigit() and k.isdigit():
            return _same_count(Value(f"{gold.name}({n},{k})"), answer)
        case _, Named("C" | "P", Many("tuple", (Value(n), Value(k)))) if n.isdigit() and k.isdigit():
            return _same_count(gold, Value(f"{answer.name}({n},{k})"))
        case Value(), Value():
            return _same_value(gold, answer)
    return False


# --- several things -----------------------------------------------------------------------------------------------


def _same_many(gold: Node, answer: Node) -> bool:
    if not isinstance(gold, Many):
        return _one_of_one(answer, gold, swap=True)
    if not isinstance(answer, Many):
        return _one_of_one(gold, answer)
    kinds = {gold.kind, answer.kind}
    if "ratio" in kinds:
        return kinds == {"ratio"} and _proportional(gold.items, answer.items)
    if "set" in kinds and kinds & {"tuple", "square"}:  # Math-Verify takes {1, 2} for (1, 2); {(1, 2)} is (1, 2)
        items, other = (gold.items, answer) if gold.kind == "set" else (answer.items, gold)
        return len(items) == 1 and (same(items[0], other) if other is answer else same(other, items[0]))
    if kinds in ({"tuple", "square"}, {"list", "square"}) and len(gold.items) == 2:
        return False  # intervals
    if _assigns(gold) != _assigns(answer) and not (_named(gold) and _named(answer)):  # x = 1, y = 2 for (1, 2)
        values = [
            tuple(item.value if isinstance(item, Named) else item for item in many.items) for many in (gold, answer)
        ]
        return "set" not in kinds and _in_order(*values)
    if kinds & {"tuple", "square"} and not (_assigns(gold) and _assigns(answer)):
        return _in_order(gold.items, answer.items)
    rest = list(_distinct(answer.items))
    for item in _distinct(gold.items):
        found = next((other for other in rest if same(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return not rest


def _proportional(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    """2:4:6 is 1:2:3."""
    crossed = [[f"({a.text})({b[0].text})" for a in items if isinstance(a, Value) and isinstance(b[0], Value)]
        for items, b in ((gold, answer), (answer, gold))]  # fmt: skip
    return len(gold) == len(answer) and all(same_expression(expression(x), expression(y)) for x, y in zip(*crossed))


def _letters(node: Node) -> str:
    """Of ACD, or of A, C, D: several choices. "" if it is something else."""
    if isinstance(node, Many):
        items = [item.text for item in node.items if isinstance(item, Value | Words)]
        letters = "".join(sorted(items)).lower()
        return letters if len(letters) == len(items) == len(node.items) and letters.isalpha() else ""
    return node.text if isinstance(node, Words) and list(node.text) == sorted(set(node.text)) else ""


def _one_of_one(many: Node, other: Node, *, swap: bool = False) -> bool:
    """{3} for 3, and a column for a tuple."""
    assert isinstance(many, Many)
    if isinstance(other, Matrix) and many.kind != "set" and 1 in (len(other.rows), len(other.rows[0])):
        items = tuple(item for row in other.rows for item in row)
        return _in_order(items, many.items) if swap else _in_order(many.items, items)
    if isinstance(other, Value) and many.kind != "list" and re.fullmatch(r"\d+(,\d{3})+", other.text):
        listed = Many("list", tuple(map(Value, other.text.split(","))))  # 100,200 was no number after all
        return _same_many(listed, many) if swap else _same_many(many, listed)
    if many.kind == "list" and len(many.items) > 1 and isinstance(other, Words):
        return _letters(many) == _letters(other) != ""
    items = _distinct(many.items)
    return (
        len(items) == 1 and many.kind in ("set", "list") and (same(other, items[0]) if swap else same(items[0], other))
    )


def _in_order(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    return len(gold) == len(answer) and all(map(same, gold, answer))


def _distinct(items: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(items))


def _named(many: Many) -> bool:
    return any(isinstance(item, Named) for item in many.items)


def _assigns(many: Many) -> bool:
    """Whether it gives values to different unknowns (not x_1, x_2: two solutions for one)."""
    names = [item.name.partition("_")[0] for item in many.items if isinstance(item, Named)]
    return len(names) == len(many.items) == len(set(names))


def _as_set(node: Node) -> Set:
    match node:
        case Range("interval", (low, high), brackets):
            return _interval(low, high, brackets[0] == "(", brackets[1] == ")")
        case Range("without", (whole, part)):
            return _as_set(whole) - _as_set(part)
        case Range("union", parts):
            return Union(*map(_as_set, parts))
        case Range("both", parts):
            return Intersection(*map(_as_set, parts))
        case Range("either", parts):  # x < -1, x > 3: a comma is "and" only where that leaves something
            both = Intersection(*map(_as_set, parts))
            return Union(*map(_as_set, parts)) if both is sympy.S.EmptySet else both
        case Range(name, ()):
            return {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "empty": sympy.S.EmptySet}[name]
        case Many("tuple" | "square", (low, high)) if not _named(node):
            return _interval(low, high, node.kind == "tuple", node.kind == "tuple")
        case Many("list" | "set", items):
            if node.kind == "set" and Range("empty") in items:  # a set with one element
                raise Unreadable
            if any(isinstance(item, Range) for item in items):
                return Union(*map(_as_set, items))
            return FiniteSet(*map(_real, items))
        case Named():
            return _as_set(node.value)
        case Value():
            return FiniteSet(_real(node))
        case Relation(">" | ">="):
            return _solution(node)
    raise Unreadable


def _interval(low: Node, high: Node, left_open: bool, right_open: bool) -> Set:
    ends = _real(low), _real(high)
    if any(end.is_extended_real is False for end in ends):  # i, or something divided by 0
        raise Unreadable
    return Interval(*ends, left_open, right_open)


def _solution(inequality: Relation) -> Set:
    """Of a linear inequality in one unknown."""
    side = expression(inequality.difference)
    if len(side.free_symbols) != 1:
        raise Unreadable
    (x,) = side.free_symbols
    # 2|x + 5| > 6 is linear only from -5 on
    if has_steps(side) or any(power.free_symbols for power in side.atoms(sympy.Pow)):
        raise Unreadable
    at = [side.xreplace({x: sympy.Integer(value)}).doit() for value in range(4)]
    slope = at[1] - at[0]
    if not (slope.is_number and slope.is_nonzero and all(same_expression(at[i + 1] - at[i], slope) for i in (1, 2))):
        raise Unreadable
    bound, strict = -at[0] / slope, inequality.operator == ">"
    return Interval(bound, sympy.oo, strict, True) if slope > 0 else Interval(-sympy.oo, bound, True, strict)


def _real(node: Node) -> Any:
    node = node.value if isinstance(node, Named) else node
    if not isinstance(node, Value):
        raise Unreadable
    value = expression(node.text)
    return value.xreplace({symbol: Symbol(symbol.name, real=True) for symbol in value.free_symbols}).doit()


def _same_set(gold: Set, answer: Set) -> bool:
    if gold == answer:
        return True
    parts = [sorted(s.args, key=lambda part: float(part.inf)) if isinstance(s, Union) else [s] for s in (gold, answer)]
    return len(parts[0]) == len(parts[1]) and all(map(_same_part, *parts))


def _same_part(a: Set, b: Set) -> bool:
    if isinstance(a, Interval) and isinstance(b, Interval):
        open_alike = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return bool(open_alike) and same_expression(a.start, b.start) and same_expression(a.end, b.end)
    if isinstance(a, FiniteSet) and isinstance(b, FiniteSet) and len(a) == len(b):
        return all(any(same_expression(x, y) for y in b) for x in a)
    return bool(a == b)


# --- one thing ----------------------------------------------------------------------------------------------------


def _same_words(gold: Node, answer: Node) -> bool:
    texts, products = [], []
    for node in (gold, answer):
        if not isinstance(node, Words | Value):
            return False
        texts.append(node.text if isinstance(node, Words) else normal_form(node.text).lower())
        products.append(node.loose if isinstance(node, Words) else node.text)
    if texts[0] == texts[1]:
        return True
    return all(products) and same_expression(*map(expression, products))  # xy and yx, perhaps


def _same_value(gold: Node, answer: Node) -> bool:
    if not isinstance(gold, Value) or not isinstance(answer, Value):  # 2 (1, 2; 3, 4) is a matrix, too
        return same_expression(_matrix(gold), _matrix(answer))
    if gold.letter or answer.letter:
        return _same_family(gold, answer)
    if gold.algebra or answer.algebra:  # 2 h and h \cdot 2
        with suppress(Unreadable):
            if same_expression(*(expression(node.algebra or node.text) for node in (gold, answer))):
                return True
    # no unit stands for any unit, but not for percent: Math-Verify takes 18 % for 18, 1000 % for 10. Words that are no
    # unit have to be those of the gold answer: "is wrong", "half"
    ratio: Any = conversion(answer.unit, gold.unit)
    if {gold.unit, answer.unit} == {"deg", "rad"}:
        ratio = sympy.pi / 180 if answer.unit == "deg" else 180 / sympy.pi
    if ratio is None and (
        (gold.unit and answer.unit) or "%" in (gold.unit, answer.unit) or answer.unit.startswith("?")
    ):
        return False
    if ratio not in (None, 1):
        return same_expression(expression(gold.text), expression(answer.text) * sympy.sympify(ratio))
    a, b = gold.number, answer.number
    if a is not None and b is not None:
        return same_number(a, b)
    if normal_form(gold.text) == normal_form(answer.text):
        return True
    texts = gold.text, answer.text
    if r"^\circ" in "".join(texts) and not re.search(r"\\(?:pi|sin|cos|tan|cot|sec|csc)", "".join(texts)):
        with suppress(Unreadable):  # 90^\circ - \alpha, with or without
            if same_expression(*(expression(text.replace(r"^\circ", " ")) for text in texts)):
                return True
    try:
        x, y = map(expression, texts)
    except Unreadable:  # one of several parts, perhaps, that has another partner
        return False
    if "deg" in (gold.unit, answer.unit) and (x.has(sympy.pi) or y.has(sympy.pi)):  # 90 degrees are \pi/2
        x, y = (part * sympy.pi / 180 if node.unit == "deg" else part for part, node in ((x, gold), (y, answer)))
    for decimal, other in ((a, y), (b, x)):
        if decimal is not None and decimal.places:
            exact = approximate(other)
            if exact is not None and decimal.stands_for(exact):
                return True
    return same_expression(x, y)


def _same_family(gold: Value, answer: Value) -> bool:
    r"""Whether k\pi + \pi/2 and n\pi - \pi/2 run through the same values; a letter that is not named is guessed."""
    ends = []
    for node in (gold, answer):
        family = expression(node.text)
        letters = [node.letter] if node.letter else [s.name for s in family.free_symbols if s.name in "kmnlt"]
        if len(letters) != 1 or Symbol(letters[0]) not in family.free_symbols:
            return False
        ends.append([family.xreplace({Symbol(letters[0]): sympy.Integer(value)}) for value in range(-4, 5)])
    (a, *_), (b, *_) = ends
    if all(map(same_expression, *ends)):
        return True
    steps = [[y - x for x, y in pairwise(values)] for values in ends]
    if not all(same_expression(step, own[0]) for own in steps for step in own):
        return False
    step, other = steps[0][0], steps[1][0]
    shift = approximate((b - a) / step)
    return (same_expression(step, other) or same_expression(step, -other)) and (
        shift is not None and abs(shift - round(shift)) < Fraction(1, 10**20)
    )


def _matrix(node: Node) -> Any:
    if isinstance(node, Value):
        return expression(node.text).doit()
    if not isinstance(node, Matrix):
        raise Unreadable
    return sympy.Matrix([[expression(cell.text) for cell in row if isinstance(cell, Value)] for row in node.rows])


def _same_relation(gold: Relation | None, answer: Relation | None) -> bool:
    """Whether they say the same of the same unknowns: x + 2y = 3 and 2x + 4y - 6 = 0."""
    if gold is None or answer is None or gold.operator != answer.operator:
        return False
    sides = expression(gold.difference), expression(answer.difference)
    return proportional(*sides, equation=gold.operator == "=")
