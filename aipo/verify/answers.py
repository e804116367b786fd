r"""Reading answers as text: which part of a response is the answer, and what its notation alone says.

Everything here is standard library, runs in the caller's process on hostile text, and takes linear time: nothing is
parsed beyond plain numbers. What has to be *understood* is for :mod:`aipo.verify.equality`, inside a worker.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_CHARS = 2000  # a longer answer is compared as text only: no real one comes near, and parsing is not linear

# --- where the answer stands ------------------------------------------------------------------------------------

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace belongs to the content
_ANSWER_LINE = re.compile(r"^[ \t*_#>-]*(?:final[ \t]+)?answer[ \t*_]*[:：][ \t*_]*", re.IGNORECASE | re.MULTILINE)
_DISPLAY = re.compile(r"\\\[.*?\\\]|\$\$.*?\$\$", re.DOTALL)
_MATH = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$((?:[^$\n\\]|\\.)+)\$|\\\(((?:[^\\]|\\[^()])+)\\\)|\\\[((?:[^\\]|\\[^\[\]])+)\\\]"
)
MAX_BOXES = 16
_NEXT_BOX = re.compile(
    r"(?:[\s$,;.&]|\\[,;()\[\]]|\\q?quad|(?:\\text\s*\{\s*)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])(?:\s*\})?"
    r"|[A-Za-z](?:_\{?\d\}?)?\s*=)*"
)
_LISTED = re.compile(
    r"(?P<separator>\\text\s*\{[\s,]*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\pm(?![A-Za-z])|(?<!\\)[,;])"
    r"|\\.|[\[\](){}]"
)
_NEXT_ITEM = re.compile(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*")
_LAST_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s*\\?%)?")
_SHUT = r"""(?:[\s})\]$*_.。'"`]|\\[)\]])*"""  # behind a letter
_LETTER = re.compile(
    r"""(?:\\[a-z]++|\\?[(\[]|[\s{$*_'"`])*+"""  # wrapping: \text{, (, \(, $, **; possessive, so that \alpha is no a
    rf"(?:([A-Z])(?={_SHUT}(?:$|[.,:;(–—-]))|([A-Z])(?=[)\]])|([a-z])(?={_SHUT}$))"  # B · B) text · b
)

_BETWEEN = r"""(?:[\s})\]$*_.'"`:,;(–—-]|\\[()\[\]])"""  # two letters
_TAKEN_BACK = r"(?:or|nor|not|no|wait|actually|incorrect|wrong)"
_ALTERNATIVE = re.compile(  # behind a letter: A or B; A. no; A, B, C; A) 12 or B) 13
    rf"{_BETWEEN}*(?i:{_TAKEN_BACK}|and|but|maybe|perhaps|false|is|isn't|if|then|to|vs)\b"
    rf"|(?:{_BETWEEN}|[/&|])*(?:\\[a-z]+\s*[{{(]*\s*)*(?:(?<=')[A-Z]'|[A-Z]\b(?!'))"
    r"""(?=(?:[\s)}\]$*"`]|\\[)\]])*(?:$|[,;/&|.:)(]|and\b|or\b))"""
    rf"|.*?(?:\b{_TAKEN_BACK}\b|[,;/&|])[^A-Za-z]*(?:\\[a-z]+[^A-Za-z]*)?"
    r"(?:[A-Z][^A-Za-z]*(?:$|[,;)])|[A-J](?:[.:)]| [–—-]) )"
    r"|[,;/ ]+\(?[b-j]\)?(?:$|[,;/ ])",
    re.DOTALL,
)
_ALTERNATIVES_WITHIN = 300  # characters


def after_thinking(response: str) -> str | None:
    """The text after the last ``</think>``, all of it without one, None if a thinking block was never closed."""
    tail = response.rpartition("</think>")[2]
    return None if "<think>" in tail else tail


def extract_answer(response: str, kind: str = "math", *, lenient: bool = False, several: bool = False) -> str | None:
    """The final answer as written, or None. Linear in the length of ``response``.

    Only the text after the thinking block counts. math: the last ``\\boxed{}``, which must be complete (a
    truncated last box is no answer, whatever stood before it), or without any box the last line ``Answer: ...``;
    with ``several`` those just before it, too, in one list (``\\boxed{4}`` and ``\\boxed{11}``), for a gold answer that
    is one (:func:`lists_several`). With ``lenient`` and neither box nor line the last ``$...$``, ``\\(...\\)`` or
    ``\\[...\\]``, or the last number.
    choice: the capital letter in whichever of box and line stands last. Raises ValueError for another ``kind``.
    """
    if kind not in ("math", "choice"):
        raise ValueError(f"kind must be 'math' or 'choice', not {kind!r}")
    text = after_thinking(response)
    if text is None:
        return None
    box, line = _last(_BOX, text), _last(_ANSWER_LINE, text)
    if box and (kind == "math" or line is None or box.start() > line.start()):
        answer = _last_boxes(text) if several else _box_content(text, box.end())
    elif line:
        answer = _first_line(text[line.end() :].lstrip()).strip(" \t\r*_").rstrip(".。")
    else:
        answer = _last_expression(text) if lenient and kind == "math" else None
    if answer is None:
        return None
    return choice_letter(answer) if kind == "choice" else _bare(answer) or None


def last_box(text: str) -> str | None:
    """The content of the last ``\\boxed{}``; None if there is none or it is not closed."""
    box = _last(_BOX, text)
    return _box_content(text, box.end()) if box else None


def bare_gold(gold: str) -> str:
    """A gold answer without ``\\boxed{}`` and dollar signs."""
    content = _last_boxes(gold)
    return _bare(gold if content is None else content)


def lists_several(gold: str) -> bool:
    r"""Whether a bare gold answer is a list: 4, 11; 4 and 11; \{4, 11\}; \pm 4; but not 1,234 or (4, 11)."""
    depth = 0
    for token in _LISTED.finditer(gold):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth == 0 and token.lastgroup == "separator":
            return number(tidy(gold)) is None
    return False


def choice_letter(text: str) -> str | None:
    """The letter A to Z that ``text`` opens with, whatever it is wrapped in; None if it is none, or one of several."""
    match = _LETTER.match(text)
    if (
        not match
        or not match.lastindex
        or _ALTERNATIVE.match(text, end := match.end(match.lastindex), end + _ALTERNATIVES_WITHIN)
    ):
        return None
    return match.group(match.lastindex).upper()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _first_line(text: str) -> str:
    """With the whole of a display that begins there."""
    display = _DISPLAY.match(text)
    end = display.end() if display else 0
    return text[:end] + text[end:].partition("\n")[0]


def _box_content(text: str, start: int) -> str | None:
    """From just behind an opening brace to its partner; None if it has none."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


def _last_boxes(text: str) -> str | None:
    """The last box and those that stand just before it, as a list; None if there is none or one is not closed."""
    items: list[str] = []
    end = 0
    for box in deque(_BOX.finditer(text), maxlen=MAX_BOXES):
        if box.start() < end:  # inside the one before
            continue
        if not (box.start() - end <= 40 and _NEXT_BOX.fullmatch(text, end, box.start())):
            items = []
        content = _box_content(text, box.end())
        if content is None:  # no answer if it is the last one
            items = []
            continue
        items.append(_bare(content))
        end = box.end() + len(content) + 1
    return ", ".join(items) if items else None


def _last_expression(text: str) -> str | None:
    """The last formula, with those before it in one list (``$1$ and $2$``), else the last number."""
    items: list[str] = []
    end = 0
    for match in _MATH.finditer(text):
        if match.start() - end > 10 or not _NEXT_ITEM.fullmatch(text, end, match.start()):
            items = []
        items.append(match.group(match.lastindex or 0))
        end = match.end()
    if items:
        return ", ".join(items)
    number = _last(_LAST_NUMBER, text)
    return number.group() if number else None


def _bare(answer: str) -> str:
    """Without surrounding white space and math delimiters."""
    answer = answer.strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1].replace("\\$", ""):
        answer = answer[1:-1].strip()
    return answer


# --- one notation -----------------------------------------------------------------------------------------------

_SYMBOLS = {
    "−–": "-", "×·⋅∗": r"\cdot ", "÷∕⁄": "/", "∞": r"\infty ", "°º˚": r"^\circ ", "±": r"\pm ", "∓": r"\mp ",
    "≤⩽": r"\leq ", "≥⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "√": r"\sqrt ", "∛": r"\sqrt[3]", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ", "⟨〈": r"\langle ", "⟩〉": r"\rangle ", "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}",
    "⅙": r"\frac{1}{6}", "⅛": r"\frac{1}{8}", "…": r"\dots ", "€": r"\euro ",
    "£": r"\pounds ", "¥": r"\yen ", "₹": r"\rupee ", "¢": r"\text{cents}", "≡": r"\equiv ", "∀": r"\forall ",
    "∨": r"\lor ", "∧": r"\land ", "γ": r"\gamma ", "\u03a9\u2126": r"\Omega ",
}  # fmt: skip
_UNICODE = str.maketrans({char: latex for chars, latex in _SYMBOLS.items() for char in chars})
_ROOT = re.compile(r"√ ?(\d+(?:\.\d+)?|[A-Za-z])")  # √12 is the root of 12; TeX's \sqrt 12 is that of 1
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴-⁹⁻]+"), re.compile("[₀-₉]+")
_SYNONYMS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom",
    "times": r"\cdot", "ast": r"\cdot", "div": "/", "le": r"\leq", "leqslant": r"\leq", "ge": r"\geq",
    "geqslant": r"\geq", "ne": r"\neq", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[",
    "rbrack": "]", "varnothing": r"\emptyset", "ldots": r"\dots", "cdots": r"\dots", "dotsc": r"\dots",
    "backslash": r"\setminus", "smallsetminus": r"\setminus", "vee": r"\lor", "wedge": r"\land", "degree": r"^\circ",
    "infin": r"\infty", "imath": "i", "jmath": "j", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "colon": ":",
    "bar": r"\overline", "bigcup": r"\cup", "bigcap": r"\cap", "R": r"\mathbb{R}", "textdollar": r"\$",
    "lg": r"\log_{10}", "cent": r"\text{cents}", "nexists": r"\text{DNE}", "implies": r"\Rightarrow",
    "forall": r"\text{ for all }", "texteuro": r"\euro", "textsterling": r"\pounds", "pound": r"\pounds",
}  # fmt: skip
_NO_MEANING = """left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle displaystyle textstyle
    scriptstyle limits nolimits quad qquad enspace thinspace rm bf it bfseries tiny small normalsize large Large LARGE
    huge Huge"""
_UPRIGHT = """textbf textit textrm textsf texttt textnormal textup mathrm mathbf mathit mathsf mathtt mathnormal hbox
    operatorname emph underline boldsymbol bm boxed fbox mbox"""
_SYNONYMS |= dict.fromkeys(_NO_MEANING.split(), "") | dict.fromkeys(_UPRIGHT.split(), r"\text")
_FUNCTIONS = "a(?:rc)?(?:sin|cos|tan)h?|arc(?:cot|sec|csc)|ar(?:sin|cos|tan)h|sinh|cosh|tanh|ln|log|exp|gcd"
_FUNCTIONS += "|sin|cos|tan|cot|sec|csc|coth|sech|csch"
_BARE_FUNCTIONS = "(?:a(?:rc)?)?(?:sin|cos|tan)h?|coth?|sech?|csch?|log|ln|exp"
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?(?: (?=\{))?")
_CURRENCY = "(dollar|pound|euro|yen|rupee)s?(?![A-Za-z]) ?"
_AMOUNT = r"(-?(?:[.,]?\d)++(?: ?\\cdot ?10 ?\^ ?\{?\d+\}?)?+(?: ?\\text ?\{ ?(?:thousand|[a-z]+illion) ?\})?+)"
_AMOUNT += r"(?= ?(?:$|[,;.)]|(?:/ ?)?\\text|(?:and|or|per)(?![a-z])))"  # and no more of it
_RULES = [
    (re.compile(pattern), new)
    for pattern, new in [
        # space and delimiters; a separator between digits only where three digits follow: 10,\!080 1\,234, not 1, 234
        (r"(?<=\d)(?:\{,\}|,?\\!|\\[,; :]|~) ?(?=\d{3}(?!\d))", ""),
        (r"\\(?:left|right) ?\.(?!\d)", ""),
        (r"\\[,;:!> ]|~", " "),
        # the sign of a currency goes behind its amount, or away where it stands in front of something else: \$100x
        (r"(?:US ?)?\\\$|US ?\$|USD(?= ?\}? ?-?\.?\d)", r"\\dollar "),
        (rf"(\\text ?\{{ ?)?\\{_CURRENCY}(?(1) ?\}}) ?{_AMOUNT}", r"\3\\text{ \2}"),
        (rf"(\\text ?\{{ ?)?\\{_CURRENCY}(?(1) ?\}}) ?(?=-?\.?\d|\\frac)|\\dollar ?", ""),
        (rf"(\\text ?\{{ ?)?\\{_CURRENCY}(?(1) ?\}})", r"\\text{\2}"),
        (r'\$|\\[()\[\]]|"', ""),
        (r"\{ ?([:,;]) ?\}", r"\1"),
        (r"\\(?:text)?color ?\{[a-zA-Z]*\}", ""),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        # one spelling of percent and degrees
        (r"\\text ?\{ ?degrees? (Celsius|Fahrenheit) ?\}", r"^\\circ \1"),
        (r"\\text ?\{ ?(?:\\?%|per ?cent(?:age)?|pct) ?\}|\\%|(?<![A-Za-z])(?:per ?cent(?:age)?|pct)(?![A-Za-z])", "%"),
        (r"\^ ?\{ ?\\circ ?\}|\\text ?\{ ?(?:degrees?|deg) ?\}|(?<=[\d}]) ?degrees?(?![A-Za-z])", r"^\\circ "),
        (r" ?\^ ?\\circ", r"^\\circ"),
        (r"(?<=\d) ?(\\text ?\{ ?)?\\Omega ?(?(1)\})$", r"\\text{ohm}"),
        # what calculators and programs write
        (r"\.\.\.", r"\\dots "),
        (rf"\\text ?\{{ ?(?:({_FUNCTIONS}) ?\}}|(max|min) ?\}}(?= ?[(\\]))", r"\\\1\2 "),
        (r"(?<=\d)\.\((\d+)\)", r".\\overline{\1}"),
        (r"(?<=\d)(\.\d*)\\dot ?\{(\d)\}(?:(\d*)\\dot ?\{(\d)\})?", r"\1\\overline{\2\3\4}"),
        (r"(?<=[\w)}\]]) ?\*\* ?(?=[\w({\[\\-])", "^"),
        (r"(?<=[\w)}\]]) ?\* ?(?=[\w({\[\\])", r"\\cdot "),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"!=", r"\\neq "),
        (r"==", "="),
        (r"(?<![\\A-Za-z])sqrt(?= ?[\d({])", r"\\sqrt"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (rf"(?<![\\A-Za-z])({_BARE_FUNCTIONS})(?= ?[({{\d\\]| [a-z]\b)", r"\\\1"),
        # braces around every argument: \frac12, \frac{1}2, \sqrt2, \sqrt(2), x^(1/2), x^-1
        (r"\\frac ?(\d|[A-Za-z]|\\pi)(?= ?[\d{\\A-Za-z])", r"\\frac{\1}"),
        (r"(\\frac ?\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}) ?(\d|[A-Za-z])", r"\1{\2}"),
        (r"\\sqrt ?(\[[^\[\]]*\])? ?(\d|[A-Za-z]|\\pi)", r"\\sqrt\1{\2}"),
        (r"\\sqrt ?(\[[^\[\]]*\])? ?\(([^()]*)\)", r"\\sqrt\1{\2}"),
        (r"\^ ?\(([^()]*)\)", r"^{\1}"),
        (r"\^ ?(- ?\w|\d(?!\d))", r"^{\1}"),
        (r"_ ?\{ ?(\w) ?\}", r"_\1"),
        (r"\\mathbb ([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
        (r"\\text ?\{ ?\}", " "),
    ]
]  # fmt: skip
_LEADING = re.compile(r"\A(?:\\approx(?![A-Za-z])|[=*]| )+")  # = 42, \approx 42, **42**


@lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    """``text`` in one notation, meaning the same: Unicode as LaTeX, one command for each thing, arguments in braces."""
    text = _RAISED.sub(lambda run: "^{" + unicodedata.normalize("NFKC", run.group()).replace("−", "-") + "}", text)
    text = _LOWERED.sub(lambda run: "_{" + unicodedata.normalize("NFKC", run.group()) + "}", text)
    text = unicodedata.normalize("NFKC", _ROOT.sub(r"\\sqrt{\1}", text).translate(_UNICODE))
    # A doubled backslash ends a row of a matrix; elsewhere it is a backslash that was escaped once too often.
    text = text.replace("\\\\", r" \cr " if "\\begin" in text else "\\")
    text = _COMMAND.sub(lambda command: _SYNONYMS.get(command.group(1), "\\" + command.group(1)), _one_space(text))
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    return _LEADING.sub("", _one_space(text)).rstrip(".,;:*\\ 。")


def _one_space(text: str) -> str:
    return " ".join(text.split())


# --- plain numbers ----------------------------------------------------------------------------------------------

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<digits>{_PLAIN})"
    r"(?: ?(?:\\cdot|x) ?10 ?\^ ?(?:\{ ?(?P<power>[+-]?\d{1,3}) ?\}|(?P<digit>\d{1,3}))|[eE](?P<e>[+-]?\d{1,3}))?"
)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?:(?P<whole>\d+) ?(?=\\)|(?P<spaced>\d+) (?=\d))?"
    r"(?:\\frac ?\{ ?(?P<a>[+-]? ?\d+) ?\} ?\{ ?(?P<b>-? ?\d+) ?\}|(?P<c>\d+) ?/ ?(?P<d>\d+))"
)
_OVERLINED = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline ?\{(\d+)\}(?: ?\\dots)?")
_DOTTED = re.compile(r"([+-]?)(\d*)\.(\d{0,9}?)(\d{1,6}?)\4{2,9} ?\\dots")  # 0.1666\dots: three times say it
MAX_DIGITS = 100  # of a number that is computed with here
ROUNDED = 6  # decimals, and digits, from which on a decimal stands for what it was rounded or cut off from


@dataclass(frozen=True)
class Number:
    """A number as written: its value and, if it was written as a decimal, how many digits and how many decimals."""

    value: Fraction
    digits: int = 0
    places: int = 0

    def stands_for(self, exact: Fraction) -> bool:
        """0.333333 stands for 1/3, 0.3333 does not: fewer digits than that are a coarser answer, hence another one."""
        return min(self.places, self.digits) >= ROUNDED and abs(self.value - exact) * 10**self.places < 1


def same_number(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    if a.places and b.places:  # 1.4142136 and 1.41421356, but never 18.90 and 18.91
        coarse, fine = sorted((a, b), key=lambda number: number.places)
        return coarse.places < fine.places and coarse.stands_for(fine.value)
    return a.stands_for(b.value) or b.stands_for(a.value)


def number(text: str) -> Number | None:
    """A tidy text as a number if it is a plain one: integer, decimal, fraction, mixed number, power-of-ten notation."""
    if len(text) > MAX_DIGITS:
        return None
    if match := _DECIMAL.fullmatch(text):
        digits = match["digits"].replace(",", "").replace(" ", "")
        power = match["power"] or match["digit"] or match["e"]
        if power is not None and abs(int(power)) > 400:
            return None
        value = Fraction(f"{match['sign']}{digits}{'e' + power if power else ''}")
        decimals = digits.partition(".")[2]
        return Number(value, len(digits.replace(".", "").lstrip("0")), 0 if power else len(decimals))
    if match := _OVERLINED.fullmatch(text) or _DOTTED.fullmatch(text):
        sign, whole_digits, once, again = match.groups()
        value = Fraction(int((whole_digits or "0") + once), 10 ** len(once))
        value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
        return Number(-value if sign == "-" else value)
    if match := _FRACTION.fullmatch(text):
        above, below = (int((match[x] or match[y]).replace(" ", "")) for x, y in ("ac", "bd"))
        whole = int(match["whole"] or match["spaced"] or 0)
        if below == 0 or (whole and not 0 < above < below):  # 2\frac{3}{2} is more likely a product
            return None
        value = whole + Fraction(above, below)
        return Number(-value if match["sign"] == "-" else value)
    return None


# --- what the text settles --------------------------------------------------------------------------------------

_INTEGER = re.compile(r"[+-]?[0-9]+")
_IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9])(?!(?<=\d,) \d{3}(?!\d)) | (?![A-Za-z0-9])|(?<=\d) (?=[A-Za-z])")
_IN_BRACES = re.compile(r"(?:\\text)? ?\{([^{}\\]*)\}")


def normal_form(answer: str) -> str:
    """One spelling for answers that differ in notation only: equal forms mean equal answers, not the other way round.

    For majority votes. Pure and idempotent; long answers (over ``MAX_CHARS``) only lose surrounding space.
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    while True:
        form = _IDLE_SPACE.sub("", tidy(answer))
        if whole := _IN_BRACES.fullmatch(form):
            form = whole.group(1).strip()
        elif plain := number(tidy(answer)):
            form = str(plain.value)
        if form == answer:
            return form
        answer = form


def settle(gold: str, answer: str) -> bool | None:
    """Whether two bare answers are equal where their text says so, else None."""
    if gold == answer:
        return bool(gold)
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):  # any number of digits, exactly
        return _integer(gold) == _integer(answer)
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False
    tidied = tidy(gold), tidy(answer)
    a, b = map(number, tidied)
    if a is not None and b is not None:
        return same_number(a, b)
    forms = normal_form(gold), normal_form(answer)
    return True if forms[0] == forms[1] and forms[0] else None


def _integer(text: str) -> tuple[bool, str]:
    """Sign and digits without leading zeros: no conversion, which is quadratic, and no float, which rounds."""
    digits = text.lstrip("+-").lstrip("0")
    return text.startswith("-") and digits != "", digits
