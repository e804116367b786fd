r"""What stands behind a number: \text{ cm}^2, inches, %, ^\circ. Text only."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

# Each unit with its size, in terms of units above it in its line or of other lines, and its other spellings.
_TABLE = """
    m 1 meter metre; cm 1/100 centimeter centimetre; mm 1/1000 millimeter millimetre; km 1000 kilometer kilometre
    m; in 127/5000 inch inche; ft 381/1250 foot feet; yd 1143/1250 yard; mi 201168/125 mile
    s 1 sec second; min 60 minute; h 3600 hr hour; day 86400; week 604800; ms 1/1000 millisecond
    month 1 mo; year 12 yr
    g 1 gram gramme; kg 1000 kilogram kilo; mg 1/1000 milligram; ton 1000000 tonne
    g; lb 45359237/100000 pound lbs; oz 45359237/1600000 ounce
    dollar 1 usd; cent 1/100
    euro 1 eur; yen 1; rupee 1 inr rs
    rad 1 radian; am 1 a.m; pm 1 p.m
    l 1/1000*m3 liter litre; ml 1/1000000*m3 milliliter millilitre; gal 473176473/125000000000*m3 gallon
    ha 10000*m2 hectare; acre 316160658/78125*m2; mph 1397/3125*m*s-1; kmh 5/18*m*s-1 kph
    hz 1*s-1 hertz; khz 1000*s-1; mhz 1000000*s-1; m; nm 1/1000000000 nanometer nanometre
    N 1000*g*m*s-2 newton; J 1000*g*m2*s-2 joule; W 1000*g*m2*s-3 watt; Pa 1000*g*m-1*s-2 pascal; V 1 volt
    kJ 1000000*g*m2*s-2 kilojoule; cal 4184*g*m2*s-2; eV 1.602176634e-16*g*m2*s-2 electronvolt
    kPa 1000000*g*m-1*s-2; A 1 ampere amp; K 1 kelvin; mol 1 mole; ohm 1
"""
_POWER = re.compile(r"([A-Za-z.]+)(-?\d)?")
_Size = tuple[Fraction, Counter[str]]  # in terms of the first units of the lines, and the powers of those


def _table() -> tuple[dict[str, str], dict[str, _Size]]:
    spellings: dict[str, str] = {}
    sizes: dict[str, _Size] = {}
    for line in _TABLE.strip().splitlines():
        base = ""
        for entry in line.split(";"):
            unit, *rest = entry.split()
            if rest:
                size, *factors = rest[0].split("*")
                base = unit if rest[0] == "1" else base
                powers = {name: int(power or 1) for name, power in _POWER.findall(" ".join(factors))}
                sizes[unit] = Fraction(size), Counter(powers or {base: 1})
                spellings |= dict.fromkeys([unit, *rest[1:]], unit)
            else:
                base = unit
    return spellings, sizes


_UNITS, _SIZES = _table()
_MULTIPLES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PREFIX = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SUFFIX = {"squared": 2, "cubed": 3}
# What is counted, in the singular, and what stands around it: says nothing that the number does not.
_THINGS = """
    unit way student people person year old day week month hour minute point apple orange banana pear marble
    ball book page card coin penny dime nickel cookie candy egg car bus train plane ticket game match team
    player goal vote friend child kid boy girl man men woman women adult parent teacher member guest passenger
    runner worker employee customer house room table chair box bag basket bottle cup glass can jar pot plate
    piece slice pizza cake pie sandwich sheep goat cow horse pig hen chicken duck dog cat fish bird rabbit
    animal tree flower plant rose seed stone rock brick tile block cube triangle rectangle circle polygon
    pentagon hexagon octagon side edge face vertex vertice vertices diagonal angle line segment arc chord path
    route step move stair floor mile integer number digit divisor factor prime solution value tuple subset set
    element term function polynomial permutation combination arrangement outcome possibility choice option word
    letter bead sticker stamp pencil pen crayon shirt shoe sock hat dress toy doll gift present flag byte vowel
    consonant committee handshake intersection region sequence string matrices matrix graph color colour round
    lap turn trip problem question answer test exam quiz mark class grade song movie photo picture email message
    call phone computer machine battery bike wheel truck boat bean carrot potato tomato lemon grape cherry
    strawberry berry peach plum melon mango coconut nut muffin donut doughnut bagel burger calorie pint quart
    serving share stock bill note job task shift red blue green white black yellow small large big total
    different distinct possible real positive odd even whole valid such ordered unordered in all of the a an
    each per th st nd rd altogether children loaf loaves mouse mice knife knives leg row
"""
_COUNTED = set(_THINGS.split())
_COUNTERS = "[个元人名种次条只本张块天年岁件组对枚颗棵位]"
_ONLY_IN_TEXT = {"A", "K", "nm"}  # else variables
_TEXT = r"\\text ?\{[^{}]*(?:\{-?\d\}[^{}]*)*\} ?(?:\^ ?(?:\d|\{ ?-?\d ?\}))?"
_IN_TEXT = re.compile(rf"(.*?[^\s\\/]) ?((?:(?:\\cdot ?|/ ?)?{_TEXT} ?)+)")
_BARE = re.compile(r"(.*[\d}])( ?)((?:[A-Za-z]++\.?[ /]?)++(?:\^ ?(?:\d|\{-?\d\}))?)")
_DEGREES = re.compile(r"(.*)\^\\circ ?(?:(?:\\text)? ?\{? ?([CF])(?:elsius|ahrenheit)? ?\}?)?")
_COUNTER = re.compile(rf"(.*\d) ?(\\text ?\{{ ?)?{_COUNTERS} ?(?(2)\}})")
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")


def split_unit(text: str) -> tuple[str, str]:
    r"""``(value, unit)``: the unit in one spelling (m s-2), "%" and "deg" among them, "" without one.

    What is counted goes without a trace: apples are not told from oranges. Other words are a unit with a "?" in front.
    """
    if text.endswith("%"):
        return text[:-1].strip(), "%"
    if match := _COUNTER.fullmatch(text):
        return match.group(1), ""
    if match := _DEGREES.fullmatch(text):
        inside = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)  # the degrees of an argument
        return (text, "") if inside else (match.group(1).strip(), "deg" + (match.group(2) or ""))
    if match := _IN_TEXT.fullmatch(text):
        value, name = match.groups()
        letter = re.fullmatch(r"\\text ?\{ ?([A-Za-z]) ?\}", name.strip())
        if letter and not _known(letter.group(1)):  # 2\mathbf{i} has no unit
            return text, ""
    elif match := _BARE.fullmatch(text):
        value, space, name = match.groups()
        if _VARIABLE.search(re.sub(r"\\text", "", value)) or not _is_unit(name, spaced=space != ""):
            return text, ""  # r^2 h
    else:
        return text, ""
    name = re.sub(r"\\text ?\{((?:[^{}]|\{-?\d\})*)\}", r"\1", name).replace(r"\cdot", " ").strip()
    if power := _SUFFIX.get(name.lower()):  # 5 squared
        return f"({value.strip()})^{power}", ""
    first, _, rest = name.partition(" ")
    if multiple := _MULTIPLES.get(first.lower().removesuffix("s")):  # 3 million
        return rf"({value.strip()})\cdot {multiple}", _one_spelling(rest)
    return value.strip(), _one_spelling(name)


def conversion(one: str, other: str) -> Fraction | None:
    """How many of the second unit make the first; None if they do not measure the same or are unknown."""
    if one == other or {one, other} in ({"deg", "degC"}, {"deg", "degF"}):
        return Fraction(1)
    if not one or not other:
        return None
    (size, base), (other_size, other_base) = _size(one), _size(other)
    return size / other_size if base and base == other_base else None  # percent and degrees have no base


@lru_cache(maxsize=256)
def _size(unit: str) -> tuple[Fraction, Counter[str]]:
    size, base = Fraction(1), Counter[str]()
    for name, power in _POWER.findall(unit):
        factor, powers = _SIZES.get(name, (Fraction(1), Counter({name: 1})))
        size *= factor ** int(power or 1)
        for of, times in powers.items():
            base[of] += times * int(power or 1)
    return size, Counter({name: power for name, power in base.items() if power})


_AMOUNT = re.compile(
    r"((?:\d+(?:\.\d+)?)|\\frac ?\{\d+\}\{\d+\}) ?(\\text ?\{[A-Za-z. ]+\}|[A-Za-z]+)(?: ?, ?| and | |$)"
)


_TWO_AMOUNTS = re.compile(r"\d.*[a-z]{2}.*\d.*[a-z]|\d [a-z]+ \d+ [a-z]")


def compound(text: str) -> tuple[str, str] | None:
    """2 hours and 30 minutes as ``(value, unit)`` in the smallest unit."""
    if not _TWO_AMOUNTS.search(text):
        return None
    text = re.sub(r"\\text ?\{([^{}]*?),? (and|,) ?\}", r"\\text{\1} and ", text).replace(r"\text{and}", "and")
    text = " ".join(re.sub(r"\\text ?\{([A-Za-z0-9., ]*)\}", r" \1 ", text).split())
    parts = list(_AMOUNT.finditer(text))
    if len(parts) < 2 or parts[0].start() or any(a.end() != b.start() for a, b in pairwise(parts)):
        return None
    units = [_one_spelling(part.group(2)) for part in parts]
    sizes = [conversion(unit, units[-1]) or Fraction(0) for unit in units]
    if parts[-1].end() < len(text) or not all(a > b > 0 for a, b in pairwise(sizes)):
        return None
    return "+".join(rf"{part.group(1)}\cdot {size}" for part, size in zip(parts, sizes)), units[-1]


def _known(word: str) -> str | None:
    """The one spelling of a unit. N is Newton, n is nothing."""
    word = word.rstrip(".")
    return _UNITS.get(word) or _UNITS.get(word.lower()) or _UNITS.get(word.lower().removesuffix("s"))


def _is_counted(word: str) -> bool:
    """7 apples, 7 boxes, 7 cherries, 7 square units."""
    forms = {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"}
    return not _COUNTED.isdisjoint(forms) or word in _PREFIX or _known(word) is not None


def _is_unit(name: str, *, spaced: bool) -> bool:
    """Whether bare letters behind a number are no variables: a known unit, or after a space words with vowels."""
    words = re.findall("[A-Za-z.]+", name)
    if len(words) > 1 and "/" not in name and all(len(word) == 1 for word in words):  # 2 m g
        return False
    return all(
        ((_known(word) or word in _PREFIX) and (spaced or len(word) > 1) and word not in _ONLY_IN_TEXT)
        or (spaced and len(word) > 2 and re.search("[aeiouy]", word))
        for word in words
    )


def _one_spelling(name: str) -> str:
    """Of m/s^2, metres per second squared, m s^{-2}: m s-2; "" of 7 red apples, "?squid" of 7 squid."""
    words = re.findall(r"[^\s{}~/^\\.-]+", name.lower().removeprefix("more "))
    if re.search(r"(?<![A-Za-z^{-])\d|[^A-Za-z0-9 ./^{}*~-]|\^ ?\{? ?0", name):  # 5 \text{6}, 5 \text{!}
        return "?" + "".join(words)
    name = re.sub(r" per |/", " / ", f" {name} ").replace("*", " ")
    powers: Counter[str] = Counter()
    sign, prefix, last = 1, 1, ""
    for word, power in re.findall(r"([A-Za-z.]+|/)|\^ ?\{? ?(-?\d)", name):
        if word == "/":
            sign = -1
        elif word.lower() in _PREFIX:
            prefix = _PREFIX[word.lower()]
        elif power or word.lower() in _SUFFIX:
            if last:
                powers[last] += sign * (int(power or _SUFFIX[word.lower()]) - 1)
        elif unit := _known(word):
            powers[unit] += sign * prefix
            prefix, last = 1, unit
        else:
            return "" if all(map(_is_counted, words)) else "?" + "".join(words)
    return " ".join(f"{unit}{power if power != 1 else ''}" for unit, power in sorted(powers.items()) if power)
