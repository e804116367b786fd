r"""Where two expressions with unknowns are compared: points of both signs and of several magnitudes.

A letter that only makes sense as an integer (n!, (-1)^n, \lfloor n/2\rfloor, \sum^n) gets integers, one that stands in
an exponent small values. Where an expression has kinks (|x|, \max, floors, roots), points around its own constants are
added: |x-3|+|x-5| and 2|x-4| differ only between 3 and 5.
"""

from __future__ import annotations

from typing import Any

import sympy
from sympy import Abs, Integer, Max, Min, Rational, ceiling, floor

_SIGNS = ["+++", "+++", "---", "+-+", "-+-", "+++", "+++", "--+", "+--", "++-"]  # of the letters in turn
_SIZES = [1, 1, 1, 1, 2, Rational(1, 6), 0, 0, Rational(1, 5), 3]  # 0: beyond every constant that occurs
_WHOLE = [3, 4, 1, 6, 2, 5, 9, 8, 12, 7]
_NEAR_CONSTANTS = 5
_STEPS = (Abs, Max, Min, floor, ceiling, sympy.sign)
_COUNTS = (sympy.factorial, sympy.binomial, sympy.Sum, sympy.Product)
_GROWS = (sympy.exp, sympy.sinh, sympy.cosh, sympy.tanh, sympy.gamma)


def points(*expressions: Any) -> list[dict[Any, Any]]:
    """Values for the unknowns; first those at which sizes are bounded, positive and near 1."""
    names = sorted(set().union(*(expr.free_symbols for expr in expressions)), key=str)
    if not names:
        return [{}]
    natural, whole, small, kinks = _roles(expressions)
    constants = {abs(c) for expr in expressions for c in expr.atoms(Rational) if abs(c) < 10**9}
    beyond = 3 * max(constants, default=Integer(0)) + 40
    rows: list[dict[Any, Any]] = []
    for k, (signs, size) in enumerate(zip(_SIGNS, _SIZES)):
        row = {}
        for i, name in enumerate(names):
            place = i if k % 2 == 0 else len(names) - 1 - i  # in both orders
            sign = 1 if signs[i % 3] == "+" else -1
            if name in whole:
                row[name] = Integer((1 if name in natural else sign) * _WHOLE[(k + 3 * i) % len(_WHOLE)])
            else:
                scale = size or (Integer(4) if name in small else beyond)
                row[name] = sign * scale * Rational(37 + 29 * place + 17 * k, 31 + 7 * k)
        rows.append(row)
    if kinks:
        for k, constant in enumerate(sorted(constants)[:_NEAR_CONSTANTS]):
            for offset in (Rational(3, 29), Rational(-5, 23)):
                near = {name: constant + offset * (i + 1) for i, name in enumerate(names) if name not in whole}
                rows.append(rows[k] | near)
    if any(expr.has(floor, ceiling) for expr in expressions):
        rows += [dict.fromkeys(names, Integer(2)), {name: Integer(2 * i - 3) for i, name in enumerate(names)}]
    return rows


def has_steps(*expressions: Any) -> bool:
    """Whether one is a formula by cases, so that where it is real matters as much as its values there."""
    return any(expr.has(*_STEPS) for expr in expressions)


def _roles(expressions: tuple[Any, ...]) -> tuple[set[Any], set[Any], set[Any], bool]:
    """The letters that are natural numbers, integers, small; and whether there are kinks."""
    natural: set[Any] = set()
    whole: set[Any] = set()
    small: set[Any] = set()
    kinks = False
    for part in (part for expr in expressions for part in sympy.preorder_traversal(expr)):
        if isinstance(part, _COUNTS):
            natural |= part.free_symbols
        elif isinstance(part, floor | ceiling):
            whole |= {symbol for symbol in part.free_symbols if symbol.name in "ijkmnN"}
        elif isinstance(part, _GROWS):
            small |= part.free_symbols
        elif part.is_Pow if isinstance(part, sympy.Expr) else False:
            base, exponent = part.args
            small |= exponent.free_symbols
            if base.is_number and base.is_negative:
                whole |= exponent.free_symbols
            kinks |= exponent.is_Rational and not exponent.is_Integer and bool(base.free_symbols)
        kinks |= isinstance(part, _STEPS)
    return natural, natural | whole, small, kinks


def real_throughout(expr: Any, point: dict[Any, Any]) -> bool:
    r"""Whether no root or logarithm in it is that of a negative number: \sqrt{x}\sqrt{y} is real at (-1, -1)."""
    for part in sympy.preorder_traversal(expr):
        root = isinstance(part, sympy.Pow) and part.args[1].is_Rational and not part.args[1].is_Integer
        if (root or isinstance(part, sympy.log)) and part.args[0].free_symbols:
            inside = part.args[0].xreplace(point).evalf(10)
            if not (inside.is_real and inside.is_nonnegative):
                return False
    return True
