r"""What stands behind a number: \text{ cm}^2, inches, %, ^\circ. Text only."""

from __future__ import annotations

import re

_SPELLINGS = {
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre", "mm": "millimeter millimetre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "g": "gram", "kg": "kilogram", "lb": "pound",
    "oz": "ounce", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "", "year": "yr",
    "l": "liter litre", "ml": "milliliter millilitre", "dollar": "usd", "cent": "", "mi/h": "mph", "km/h": "kmh kph",
    "rad": "radian", "am": "a.m", "pm": "p.m",
}  # fmt: skip
_UNITS = {spelling: unit for unit, others in _SPELLINGS.items() for spelling in [unit, *others.split()]}
_POWERS = {"2": r"\^ ?\{?2|\b(?:sq|squared?)\b", "3": r"\^ ?\{?3|\b(?:cu|cubic|cubed)\b"}
_IN_TEXT = re.compile(r"(.*?[^\s\\/]) ?((?:(?:\\cdot ?|/ ?)?\\text ?\{[^{}]*\} ?(?:\^ ?(?:\d|\{ ?-?\d ?\}))?)+)")
_BARE = re.compile(r"(.*[\d}])( ?)((?:[A-Za-z]++\.?[ /]?)++(?:\^ ?(?:\d|\{\d\}))?)")
_DEGREES = re.compile(r"(.*)\^\\circ ?(?:(?:\\text)? ?\{? ?[CF] ?\}?)?")


def split_unit(text: str) -> tuple[str, str]:
    """``(value, unit)``: the unit in one spelling, "%" and "deg" among them, "" without one that is known.

    Unknown words behind a number go without a trace: apples are not told from oranges.
    """
    if text.endswith("%"):
        return text[:-1].strip(), "%"
    if match := _DEGREES.fullmatch(text):
        inside = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)  # the degrees of an argument
        return (text, "") if inside else (match.group(1).strip(), "deg")
    if match := _IN_TEXT.fullmatch(text):
        letter = re.fullmatch(r"\\text ?\{ ?([A-Za-z]) ?\}", match.group(2).strip())
        if letter is None or letter.group(1) in _UNITS:  # 2\mathbf{i} has no unit
            return match.group(1).strip(), _one_spelling(match.group(2))
    elif (match := _BARE.fullmatch(text)) and _is_unit(match.group(3), spaced=match.group(2) != ""):
        return match.group(1).strip(), _one_spelling(match.group(3))
    return text, ""


def _is_unit(name: str, *, spaced: bool) -> bool:
    """Whether bare letters behind a number are no variables: a known unit, or after a space words with vowels."""
    return all(
        (word.lower() in _UNITS and (spaced or len(word) > 1))
        or (spaced and len(word) > 2 and re.search("[aeiouy]", word))
        for word in re.findall("[A-Za-z.]+", name)
    )


def _one_spelling(name: str) -> str:
    name = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", name).strip().lower().replace(r"\cdot", " ")
    power = "".join(power for power, pattern in _POWERS.items() if re.search(pattern, name))
    name = re.sub(r"\^ ?\{?-?\d\}?|\b(?:sq|squared?|cu|cubic|cubed)\b", "", name).replace(" per ", "/")
    parts = [part.strip(" .") for part in name.split("/")]
    known = [_UNITS.get(part) or _UNITS.get(part.removesuffix("s")) for part in parts]
    return "/".join(unit for unit in known if unit) + power if all(known) else ""
