r"""What a function is applied to: \sin 2t\cos t is \sin(2t)\cos(t), and \sin t\cdot 2 is \sin(t)\cdot 2. Text only.

Math-Verify's parser lets a function swallow all factors that follow, over \cdot as well, and reads \coth as \cot h.
"""

from __future__ import annotations

import re

_RECIPROCALS = {r"\coth": r"\tanh", r"\sech": r"\cosh", r"\csch": r"\sinh"}
_INVERTIBLE = ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh"]
_KNOWN = {rf"\{prefix}{name}" for name in _INVERTIBLE for prefix in ("", "arc")}
_KNOWN |= {r"\ln", r"\log", r"\exp", r"\arsinh", r"\arcosh", r"\artanh"}
_SHORT = {rf"\a{name}": rf"\arc{name}" for name in _INVERTIBLE}
_NAMES = _KNOWN | _SHORT.keys() | _RECIPROCALS.keys()

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|(?<=[_^])\d|\d+(?:\.\d+)?|.", re.DOTALL)
_OPENING, _CLOSING = {"(", "{", "[", r"\{"}, {")", "}", "]", r"\}"}
_ENDS = {*"+-=,;:<>&|", r"\cdot", r"\pm", r"\mp", r"\cr", r"\text", r"\land", r"\lor", r"\to", r"\leq", r"\geq"}


def with_arguments(text: str) -> str:
    """``text`` with brackets around the argument of every function, under names that the parser knows."""
    return "".join(_rewritten(_TOKEN.findall(text))) if "\\" in text else text


def _rewritten(tokens: list[str]) -> list[str]:
    done: list[str] = []
    at = 0
    while at < len(tokens):
        name = tokens[at]
        at += 1
        if name not in _NAMES:
            done.append(name)
            continue
        scripts: list[str] = []
        while (start := _skip(tokens, at)) < len(tokens) and tokens[start] in ("^", "_"):
            at = _group(tokens, start + 1)
            scripts += tokens[start:at]
        start = _skip(tokens, at)
        at = _argument(tokens, start)
        argument = tokens[start:at]
        if argument and argument[0] in "({" and _group(argument, 0) == len(argument):
            argument = argument[1:-1]
        inside = "".join(_rewritten(argument))
        if not inside.strip():
            done += [name, *scripts]
        elif reciprocal := _RECIPROCALS.get(name):
            done += [rf"(\frac{{1}}{{{reciprocal}({inside})}})", *scripts]
        else:
            done += [_SHORT.get(name, name), *scripts, "(", inside, ")"]
    return done


def _skip(tokens: list[str], at: int) -> int:
    while at < len(tokens) and tokens[at] == " ":
        at += 1
    return at


def _group(tokens: list[str], at: int) -> int:
    """The end of the bracket, command with its arguments, or single token that begins at ``at``."""
    at = _skip(tokens, at)
    if at >= len(tokens):
        return at
    first = tokens[at]
    if first not in _OPENING:
        at += 1
        if first in (r"\frac", r"\sqrt", r"\binom"):
            while (start := _skip(tokens, at)) < len(tokens) and tokens[start] in "{[":
                at = _group(tokens, start)
        return at
    depth = 0
    for end in range(at, len(tokens)):
        depth += (tokens[end] in _OPENING) - (tokens[end] in _CLOSING)
        if depth == 0:
            return end + 1
    return len(tokens)


def _argument(tokens: list[str], at: int) -> int:
    r"""The end of an argument: one bracket or |...|, or else factors up to a sign, \cdot, another function, or (."""
    start = at
    if at < len(tokens) and tokens[at] in ("(", "{"):
        return _group(tokens, at)
    if at < len(tokens) and tokens[at] == "|":
        return tokens.index("|", at + 1) + 1 if "|" in tokens[at + 1 :] else at
    last = ""
    while (here := _skip(tokens, at)) < len(tokens) and tokens[here] not in _NAMES | _CLOSING:
        token = tokens[here]
        if token in _ENDS and not (at == start and token in "+-"):
            break
        if token == "(" and not (last == r"\pi" or last[-1:].isdigit()):  # \cos x(1+x), but \sin 2(x+1)
            break
        after = _group(tokens, here + (token in "^_"))
        if token == "/" and _NAMES.intersection(tokens[after : after + 2]):
            break
        at, last = after, token
    return at
