r"""Are two expressions equal? The innermost part of the verifier, on sympy, inside a worker.

Math-Verify's parser turns LaTeX into unevaluated sympy trees. They are compared exactly where they are rational, else
by their values at fixed points, which is quick and settles inequality as well, else by Math-Verify, which simplifies.
No text is evaluated as Python: the parser builds sympy objects from a grammar, and the readers of Math-Verify that end
in ``eval`` are not used.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from antlr4 import PredictionMode, Token
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy
from math_verify import verify
from sympy import I, Symbol, oo

from aipo.verify.answers import number
from aipo.verify.functions import with_arguments
from aipo.verify.notation import Unreadable
from aipo.verify.sampling import has_steps, points, real_throughout

MAX_BITS = 100_000  # of a number: 2^{2024} is computed, 9^{9^9} is not
DIGITS = 30  # to which values are computed,
CLOSE = sympy.Float("1e-22")  # and within which they are equal
_KEEP_CASE = ConversionConfig(lowercase_symbols=False)

_COMPUTED_AT_ONCE = re.compile(r"\\binom.*\d{5}|\\(?:gcd|lcm) ?\([^()]*[A-Za-z(]")  # too early: \gcd(a, b) is 1 then
_FOR_THE_PARSER = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"(?<=\d)(?<![\^_]\d) ?(?=\()|(?<=\)) ?(?=[\d(])", r"\\cdot "),  # it reads 2(3) as the mixed number 5
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"\\(gamma|Gamma(?! ?\())(?![A-Za-z])", r"\\mathit{\1}"),  # or both are Euler's constant
        (r"\\log ?_ ?e(?![A-Za-z])", r"\\ln "),
        (r"\\pi ?(?=\()", r"\\pi \\cdot "),  # or it is a function
        # combinations as others write them; behind a number it takes the result for the rest of a mixed number
        (
            r"(?<![A-Za-z\\])C ?\( ?(\d+) ?, ?(\d+) ?\)|(?:\{\})?[_^] ?\{?(\d+)\}? ?C ?_ ?\{?(\d+)\}?",
            r"\\binom{\1\3}{\2\4}",
        ),
        (
            r"(?<![A-Za-z\\])P ?\( ?(\d+) ?, ?(\d+) ?\)|(?:\{\})?[_^] ?\{?(\d+)\}? ?P ?_ ?\{?(\d+)\}?",
            r"\\frac{\1\3!}{(\1\3-\2\4)!}",
        ),
        (r"C ?(?:_ ?\{?(\d+)\}? ?\^ ?\{?(\d+)\}?)", r"\\binom{\1}{\2}"),
        (r"(?<=[\d})]) ?(?=\\(?:binom|gcd|max|min|lfloor|lceil)(?![a-z]))", r"\\cdot "),
        (r"\\text ?\{ ?cis ?\} ?(?:\(([^()]*)\)|(\S+))", r"e^{i(\1\2)}"),
        (r"(\d+(?:\.\d+)?)\^\\circ", r"(\1\\cdot \\frac{\\pi}{180})"),  # it drops degrees, those in \sin 30^\circ too
        (r"(?<=\d),(?=\d{3}(?!\d))(?![^(]*\))", ""),
        (r"\\text ?\{ ?([A-Za-z]) ?\}", r" \1 "),
        (r"\\cr(?![A-Za-z])", r"\\\\"),
        (r"(?<![A-Za-z\\])([a-df-zA-Z]|\\pi)(?= ?\^)", r"{\1}"),  # its grammar is ambiguous there, hence slow
    ]
]

_UNCLEAR = re.compile(  # \frac141, \sqrt21, x^21: for TeX the last digit is a factor
    r"\\(?:frac ?\{[^{}]*\}|sqrt(?: ?\[[^\]]*\])?) ?\{[^{}]*\}\d|(?<![A-Za-z\\])[A-Za-z\d)] ?\^(?:\{\d+\}\d|\d\d)|\d ?'"
)


@lru_cache(maxsize=4096)  # the rollouts of one question share their gold
def expression(text: str) -> Any:
    """A tidy text as a sympy expression or matrix, unevaluated, without floats. Raises Unreadable."""
    if _COMPUTED_AT_ONCE.search(text) or _UNCLEAR.search(text):
        raise Unreadable
    if plain := number(text):  # the parser takes 1e6 for a product
        return sympy.Rational(plain.value.numerator, plain.value.denominator)
    text = with_arguments(text)
    for pattern, new in _FOR_THE_PARSER:
        text = pattern.sub(new, text)
    try:
        parsed = _parse(text)
    except MemoryError:
        raise
    except Exception as error:  # the parser raises plain Exceptions, and IndexError, AttributeError and the like
        raise Unreadable from error
    if not isinstance(parsed, sympy.Expr | sympy.MatrixBase) or parsed.has(sympy.zoo, sympy.nan):
        raise Unreadable
    _bits(parsed, points(parsed)[0])
    parsed = parsed.replace(lambda part: part.is_Float, lambda part: sympy.Rational(str(part)))
    if parsed.has(sympy.Sum, sympy.Product):  # where i is an index
        return parsed
    return parsed.xreplace({Symbol("i"): I, Symbol("e"): sympy.E})  # the parser takes them for unknowns


def _parse(text: str) -> Any:
    """Math-Verify's parser in its quick mode, on the rule for one expression; as it comes where that does not do.

    ANTLR's two-stage parsing: what the first stage (SLL) accepts, the second (LL) reads alike, in three times the time.
    """
    reader = _Latex2Sympy(config=_KEEP_CASE)
    parser = reader.create_parser(text)
    parser._interp.predictionMode = PredictionMode.SLL
    try:
        tree = parser.expr()
        if parser.getTokenStream().LA(1) == Token.EOF:
            return reader.convert_expr(tree)
    except MemoryError:
        raise
    except Exception:  # all of its errors are plain Exceptions; those that are no fault of this mode come again
        pass
    return latex2sympy(text, normalization_config=None, conversion_config=_KEEP_CASE)


def same_expression(a: Any, b: Any) -> bool:
    """Whether two expressions are equal wherever both are real: at points of both signs and several magnitudes.

    A point at which neither is real proves nothing; one at which only one of them is tells them apart if they have
    steps (|x|, max, floor), and otherwise not: ln(ab) and ln(a) + ln(b).
    """
    if a == b:
        return True
    if a.is_Matrix or b.is_Matrix:
        a, b = a.doit(), b.doit()
        return bool(a.is_Matrix and b.is_Matrix and a.shape == b.shape) and all(map(same_expression, a, b))
    x, y = _exact(a), _exact(b)
    if x is not None and y is not None:
        return x == y
    b = _in_case_of(a, b)
    complex_valued = not (a.free_symbols | b.free_symbols) or a.has(I) or b.has(I)
    strict = has_steps(a, b)
    values, real, alike = 0, 0, True
    for point in points(a, b):
        left, right = _at(a, point), _at(b, point)
        if left is None or right is None:
            continue
        values += 1
        near, domains = _near(left, right), {True}
        if not complex_valued:
            domains = {_is_real(left), _is_real(right)}
            if domains == {True} and not near:
                domains = {real_throughout(a, point), real_throughout(b, point)}
        if (domains == {True} and not near) or (len(domains) > 1 and strict):
            return False
        real += domains == {True}
        alike &= near
    if values:
        return real > 1 or (real == 1 and alike)
    if a.has(oo) or b.has(oo):
        return bool(a.doit() == b.doit()) and not a.doit().has(sympy.nan)
    return _by_math_verify(a, b)


def _in_case_of(a: Any, b: Any) -> Any:
    """``b`` with R for r where ``a`` writes R and neither writes both: 3r^2 answers 3R^2, but R - r is not 0."""
    names = {symbol.name for symbol in a.free_symbols}, {symbol.name for symbol in b.free_symbols}
    return b.xreplace(
        {
            Symbol(name): Symbol(name.swapcase())
            for name in names[1] - names[0]
            if name.swapcase() in names[0] - names[1] and name.isalpha()
        }
    )


def _is_real(value: Any) -> bool:
    return value.is_Rational or value.is_Float or bool(abs(sympy.im(value)) <= CLOSE * max(abs(value), 1))


def _by_math_verify(a: Any, b: Any) -> bool:
    try:
        return bool(verify(a, b, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception as error:  # "Can't evaluate nan or zoo" and the like are plain Exceptions too
        raise Unreadable from error


def proportional(a: Any, b: Any, *, equation: bool) -> bool:
    """Whether a = 0 and b = 0 are one equation in the same unknowns, or else a > 0 and b > 0 one inequality."""
    b = _in_case_of(a, b)
    if not a.free_symbols or a.free_symbols != b.free_symbols:
        return False
    if equation:  # xy = 1 and y = 1/x
        a, b = (sympy.fraction(sympy.together(side))[0] for side in (a, b))
    ratios: list[Any] = []
    for point in points(a, b):
        left, right = _at(a, point), _at(b, point)
        if left is None or right is None or not (_is_real(left) and _is_real(right)):
            continue
        if _near(left, sympy.S.Zero) or _near(right, sympy.S.Zero):
            if not _near(left, right):
                return False
            continue
        ratios.append(left / right)
        if not _near(ratios[0], ratios[-1]):
            return False
    return len(ratios) > 2 and (equation or bool(ratios[0] > 0))


def approximate(expr: Any) -> Fraction | None:
    """The value of a real constant to 30 digits."""
    value = None if expr.free_symbols else expr.evalf(DIGITS)
    return Fraction(str(value)) if value is not None and value.is_Float and value.is_finite else None


def _bits(expr: Any, point: dict[Any, Any]) -> float:
    """An upper bound for the bits of all numbers in ``expr`` once evaluated. Raises Unreadable if it is too high."""
    inner = [_bits(arg, point) for arg in expr.args]
    bits: float
    expr = point.get(expr, expr)
    if expr.is_Rational:
        bits = max(int(expr.p).bit_length(), int(expr.q).bit_length())
    elif expr.is_Float:
        bits = abs(math.frexp(float(expr))[1]) + 60 if math.isfinite(float(expr)) else math.inf
    elif expr.is_Pow or isinstance(expr, sympy.exp | sympy.cosh | sympy.sinh):
        exponent = expr.args[-1]
        bits = (inner[0] if expr.is_Pow else 2) * max(_size(exponent, inner[-1], point), 1.0)
    elif isinstance(expr, sympy.factorial | sympy.gamma):
        bits = 2.0 ** min(inner[0], 64) * inner[0]
    else:
        bits = sum(inner) if inner else 2
    if bits > MAX_BITS:
        raise Unreadable
    return bits


def _size(exponent: Any, bits: float, point: dict[Any, Any]) -> float:
    """How large an exponent is, whose own numbers are bounded, where it will be evaluated."""
    if exponent.is_Rational:
        return abs(float(exponent))
    if bits < 200 and not exponent.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.factorial):
        value = exponent.xreplace(point).evalf(5)
        if value.is_number and value.is_finite and not value.has(sympy.Function):
            return 4 * float(abs(value))
    return float(2.0 ** min(bits, 64))


def _exact(expr: Any) -> Fraction | None:
    """The value of a tree of rationals, sums, products, whole powers and factorials."""
    if expr.is_Rational:
        return Fraction(int(expr.p), int(expr.q))
    values = []
    for arg in expr.args:
        if (value := _exact(arg)) is None:
            return None
        values.append(value)
    if expr.is_Add:
        return sum(values, Fraction(0))
    if expr.is_Mul:
        return math.prod(values, start=Fraction(1))
    if expr.is_Pow and values[1].denominator == 1 and (values[0] or values[1] > 0):
        return values[0] ** int(values[1])
    if isinstance(expr, sympy.factorial) and values[0].denominator == 1 and values[0] >= 0:
        return Fraction(math.factorial(int(values[0])))
    return values[0] if isinstance(expr, sympy.UnevaluatedExpr) else None


def _at(expr: Any, point: dict[Any, Any]) -> Any | None:
    """The value at a point: a Rational if exact, else a complex number; None if there is none or it is too large."""
    try:
        _bits(expr, point)
    except Unreadable:
        return None
    expr = expr.xreplace(point)
    exact = _exact(expr)
    if exact is not None:
        return sympy.Rational(exact.numerator, exact.denominator)
    value = expr.evalf(DIGITS)
    if value.is_number and value.is_finite and abs(value) > 1:  # 10^{50} + \sqrt{2} has digits behind the point, too
        value = expr.evalf(DIGITS + math.ceil(sympy.log(abs(value), 10)))
    return value if value.is_number and value.is_finite and not value.has(sympy.Function) else None


def _near(a: Any, b: Any) -> bool:
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    size = max(abs(a), abs(b))
    return bool(size < 1e-50 or abs(a - b) < min(size, 1) * CLOSE)
