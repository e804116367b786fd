"""What is the answer of a response, and what its text alone says about it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.verify.answers import (
    MAX_CHARS,
    bare_gold,
    choice_letter,
    extract_answer,
    lists_several,
    normal_form,
    number,
    settle,
    tidy,
)

# --- where the answer stands


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3} no, \boxed{5}", "5"),
        (r"\boxed{3} no, \boxed{5", None),  # truncated: the earlier box was not meant
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ $5$ }", "5"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        ("5", None),
        ("", None),
        ("First\n**Answer: 5**\n", "5"),
        ("Answer: 3\nFinal answer: $5$.", "5"),
        ("**Answer:**\n\n$5$\n", "5"),
        ("Answer:\n", None),
        ("Answer：5。", "5"),
        ("Answer:\n\\[\n5\n\\]\nor so", "\\[\n5\n\\]"),
        ("**Answer:** $$\n5\n$$", "$$\n5\n$$"),
        ("Answer:\n$$5$$ or\n$$6$$", "$$5$$ or"),
        ("Answer: 3\n" + r"\boxed{5}", "5"),
        (r"\boxed{5}" + "\nAnswer: 3", "5"),
        (r"<think>\boxed{3}</think> \boxed{5}", "5"),
        (r"<think>\boxed{3}</think> I do not know", None),
        (r"thought of \boxed{3}</think> \boxed{5}", "5"),  # <think> stood in the prompt
        (r"<think> \boxed{5}", None),
        (r"<think>a</think> \boxed{5} <think> hm", None),
    ],
)
def test_the_last_complete_box_behind_the_thinking_block_is_the_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so $x = 3$, hence $5$.", "5"),
        (r"first \(3\), then \[ \frac{1}{2} \]", r"\frac{1}{2}"),
        ("either $1$ or $2$", "1, 2"),
        ("$3$ is wrong; we get $1$ and $2$, I think", "1, 2"),
        ("it costs $$18$$ in all", "18"),
        ("3 of 4 make 12.5%", "12.5%"),
        ("it is -7.", "-7"),
        ("it is 1,234 or so", "1,234"),
        ("3/4", "3/4"),
        ("nothing", None),
        ("", None),
        (r"7 or \boxed{5", None),  # a box that was begun is still the answer, and incomplete
        ("Answer: 5\nor $7$", "5"),
        ("<think>$5$", None),
        ("<think>$5$</think>so 6", "6"),
    ],
)
def test_lenient_takes_the_last_formula_or_number(response: str, answer: str | None) -> None:
    assert extract_answer(response, lenient=True) == answer
    if "Answer" not in response:
        assert extract_answer(response) is None


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("Answer: A\nno\nAnswer: B", "B"),
        ("**Answer: (B)**", "B"),
        ("**Answer:**\nB", "B"),
        ("Answer: B) 4.2 eV", "B"),
        ("Answer: b", "B"),
        ("Answer: $B$", "B"),
        (r"Answer: \(B\)", "B"),
        (r"**Answer:** \( B \)", "B"),
        (r"**Answer: \(\text{B}\)**", "B"),
        (r"Answer: \[B\]", "B"),
        ("Answer:\n\\[\nB\n\\]", "B"),
        (r"\boxed{\(B\)}", "B"),
        ("Answer：B。", "B"),
        (r"Answer: \boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        ("Answer: A\n" + r"\boxed{B}", "B"),
        (r"\boxed{A}" + "\nAnswer: B", "B"),
        ("Answer: Because", None),
        ("Answer: a triangle", None),
        (r"\boxed{\alpha}", None),
        ("B", None),
        ("<think>Answer: B", None),
    ],
)
def test_a_choice_is_the_last_letter_on_an_answer_line_or_in_a_box(response: str, letter: str | None) -> None:
    assert extract_answer(response, "choice") == letter
    assert extract_answer(response, "choice", lenient=True) == letter


@pytest.mark.parametrize(
    "text",
    [
        *(
            "A, B, C, D",
            "A: no, B",
            "A (or B)",
            "A or B",
            "A/B",
            "(A), (B)",
            "A. Wait, B",
            "A, not sure",
            "A (not B) C",
        ),
        *("A B C D", "A, maybe B", "A is wrong", "A) 12 or B) 13", "A. foo, B. bar", "a, b", r"\text{A, B}"),
        r"\text{(A)} \text{ or } \text{(B)}",
        *(r"\(A\), \(B\)", r"\(A\) or \(B\)", r"\[A\]: no", "A – B", "A — not sure", "A – foo, B – bar", "a – b"),
        *("'A', 'B'", "'A'. 'B'", "'A' – or 'B'", "`A`, `B`", "`A`. `B`", '"A" - "B"'),
    ],
)
def test_a_letter_among_others_is_no_choice(text: str) -> None:
    assert choice_letter(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "A",
            "A)",
            "A) 4.2 eV",
            "A. vitamin C",
            r"\textbf{(A)}\ 12",
            "A: group A streptococcus",
            "A. $x = 2B$",
            "A: yes",
        ),
        *(r"\(A\)", r"\( \mathbf{A} \). 12", r"\[\text{(A)}\]", "A – text", "A — 3, 4 and 5", "A – New York, NY"),
        *("'A'", '"A"', "`A`", "`A`: text", "A。", "a"),
        *("(a)", "A, because it is larger", "A) 3, 4 and 5", "A) vitamin D deficiency", "A. New York, NY"),
    ],
)
def test_what_an_option_says_may_stand_behind_its_letter(text: str) -> None:
    assert choice_letter(text) == "A"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{4} and \boxed{11}", "4, 11"),
        (r"$x=\boxed{4}$ \text{ or } $x_2 = \boxed{11}$.", "4, 11"),
        (r"\boxed{7} is no root. \boxed{4}, \boxed{11}", "4, 11"),
        (r"\boxed{4} and \boxed{11", None),
        (r"We write \boxed{ as asked. So \boxed{4, 11}", "4, 11"),
        (r"\boxed{7}, \boxed{ and \boxed{4}, \boxed{11}", "4, 11"),
        (r"\boxed{\boxed{4}}", r"\boxed{4}"),
        ("Answer: 5", "5"),
    ],
)
def test_several_boxes_in_a_row_are_one_list_for_a_gold_list(response: str, answer: str | None) -> None:
    assert extract_answer(response, several=True) == answer


@pytest.mark.parametrize(
    ("gold", "several"),
    [
        *(
            ("4, 11", True),
            (r"4 \text{ and } 11", True),
            (r"\pm 4", True),
            (r"\{4, 11\}", True),
            ("(1,2), (3,4)", True),
        ),
        *(("1,234", False), ("(4, 11)", False), ("4", False), (r"\text{Anders and}", False), ("[0, 1)", False)),
    ],
)
def test_gold_lists_are_told_from_numbers_and_tuples(gold: str, several: bool) -> None:
    assert lists_several(gold) is several


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["math", "choice"])
@pytest.mark.parametrize(
    "unit",
    [
        *(r"\boxed{", "}", "{", "\\", "answer:", "*", "<think>", "Answer: \n", r"\boxed ", "\\a"),
        *("(", "$", r"\(", r"\[", "$5$ ", "5 ", "1,", " ", "-"),
    ],
)
def test_extraction_stays_linear(unit: str, kind: str) -> None:
    extract_answer(unit * 200_000, kind, lenient=True, several=True)  # minutes if quadratic: the suite would not end


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind must be 'math' or 'choice', not 'maths'"):
        extract_answer(r"\boxed{5}", "maths")


def test_gold_answers_come_with_and_without_a_box() -> None:
    for gold in ("5", "$5$", r"\boxed{5}", r"$\boxed{5}$", " 5 "):
        assert bare_gold(gold) == "5"


# --- one notation


@pytest.mark.parametrize(
    ("forms", "normal"),
    [
        (["1/2", "0.5", ".50", r"\frac12", r"\dfrac{1}{2}", r"\tfrac 1 2", "$\\frac{2}{4}$", "½", "{0.5}"], "1/2"),
        (["1234", "1,234", r"1\,234", "1{,}234", r"1,\!234", "1234.0", "+1234", r"\text{1234}", "1234."], "1234"),
        (["3/2", r"1\frac{1}{2}", "1 1/2", "1.5", r"1 \frac 12"], "3/2"),
        (["320000", r"3.2 \times 10^5", "3.2e5", r"3.2\cdot10^{5}"], "320000"),
        ([r"\frac{1}{6}", r"0.1\overline{6}", r"0.1666\ldots", "0.1666...", r"0.1\dot{6}"], "1/6"),
        ([r"\frac{4}{11}", r"0.\overline{36}", "0.(36)", r"0.\dot{3}\dot{6}"], "4/11"),
        ([r"\frac17", r"0.\dot{1}4285\dot{7}"], "1/7"),
        (["5", "5.", "5。"], "5"),
        (["100, 200, 300", r"100,\ 200,\,300"], "100, 200, 300"),
        (["3/2", r"\$1\frac12", r"\text{\$}\frac32", r"\text{\$1.50}"], "3/2"),
        ([r"2\sqrt{3}", r"2 \sqrt 3", "2√3", r"\displaystyle 2\sqrt{3}", "2sqrt(3)"], r"2\sqrt{3}"),
        ([r"(1,2)", r"\left( 1, 2 \right)", "( 1 , 2 )", "（1，2）"], "(1,2)"),
        ([r"30^\circ", r"30^{\circ}", "30°", "30 degrees", r"30\text{ degrees}"], r"30^\circ"),
        ([r"50\%", "50%", r"50\text{ percent}", "50 percent"], "50%"),
        (["x^2", "x²", "x^{2}", "x^(2)"], "x^{2}"),
        ([r"\text{Evelyn}", "Evelyn", r"\mathrm{Evelyn}", r"\textbf{Evelyn}"], "Evelyn"),
        (["−5", "-5", "–5"], "-5"),
        (["2516_8", "2516_{8}", "2516₈"], "2516_8"),
    ],
)
def test_spellings_of_one_answer_have_one_normal_form(forms: list[str], normal: str) -> None:
    assert {normal_form(form) for form in forms} == {normal}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1, 234", "1,234"),
        ("12", "1 2"),
        ("18", r"18\%"),
        ("2516_8", "2516_7"),
        ("2516_8", "25168"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", r"\{1,2\}"),
        (r"\sqrt{12}", r"\sqrt{1}2"),
        (r"\frac{1}{3}", "0.333333"),
        ("0.1", "0.10000000000000000001"),
        ("105263157894736848", "105263157894736849"),
        ("-5", "5"),
        ("x", "-x"),
        ("5!", "5"),
        ("1/0", "2/0"),
    ],
)
def test_different_answers_have_different_normal_forms(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)


SNIPPETS = [*"0123456789+-^!_{}()[]\\,.=%$ix<>|:;&/*'~ \"½²√π−°…１", r"\frac", r"\sqrt", r"\text{", r"\left(", r"\,"]
SNIPPETS += [
    r"\!",
    r"\cdot ",
    r"\pm",
    r"\begin{pmatrix}",
    r"\\",
    r"\overline{",
    r"\$",
    r"\choose",
    "degrees",
    "percent",
]
texts = st.text(max_size=30) | st.lists(st.sampled_from(SNIPPETS), max_size=14).map("".join)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(texts)
def test_the_normal_form_is_its_own_normal_form(text: str) -> None:
    form = normal_form(text)
    assert normal_form(form) == form
    assert normal_form(f"  {text} ") == form or len(text) > MAX_CHARS - 3
    assert settle(text, text) in (True, None) or not text


rationals = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000)


def spellings(value: Fraction) -> list[str]:
    sign, p, q = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [f"{sign}{p}/{q}", rf"{sign}\frac{{{p}}}{{{q}}}", rf"\frac{{{sign}{3 * p}}}{{{3 * q}}}"]
    if q == 1:
        forms += [f"{sign}{p:,}", f"{sign}{p}.0", f"{sign}{p}"]
    elif p > q:
        forms.append(rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}")
    if 10**6 % q == 0:
        forms.append(f"{sign}{p * 10**6 // q / 10**6:.6f}" if p < 10**9 else f"{sign}{p}/{q}")
    return forms


@given(rationals, rationals, st.data())
def test_plain_numbers_are_compared_as_numbers(a: Fraction, b: Fraction, data: st.DataObject) -> None:
    one, other = data.draw(st.sampled_from(spellings(a))), data.draw(st.sampled_from(spellings(b)))
    read = number(tidy(one))
    assert read is not None
    assert read.value == a
    assert (normal_form(one) == normal_form(other)) == (a == b)
    if settle(one, other) != (a == b):  # only a decimal that is rounded may stand for another number
        assert settle(one, other)
        assert abs(a - b) < Fraction(1, 10**6)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1" * 5000, "1" * 5000, True),
        ("1" * 5000, "1" * 4999 + "2", False),
        ("-7", "-007", True),
        ("0", "-0", True),
        ("", "", False),
        (r"\frac{1}{3}", "0.33", False),
        (r"\frac{1}{3}", "0.33333", False),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{2}{3}", "0.666666", True),
        (r"\frac{2}{3}", "0.666667", True),
        (r"\frac{2}{3}", "0.666668", False),
        ("0.0000672", "0.0000673", False),
        ("1.414213", "1.41421356", True),
        ("18.900001", "18.900002", False),
        ("1000000", "1000000.4", False),
        ("x", "y", None),
        ("2", "2 or 3", None),
        ("x" * 3000, "y", False),
    ],
)
def test_text_settles_numbers_and_leaves_the_rest(gold: str, answer: str, equal: bool | None) -> None:
    assert settle(gold, answer) is equal


@pytest.mark.parametrize(
    "unit",
    [r"\frac{", "{", "}", r"\sqrt[", "1,", " ", r"\text{", "½", "√", r"{\choose", "1 ", ".", r"\$", r"\$1", "1,111,"],
)
def test_normal_forms_of_nonsense_are_quick(unit: str) -> None:
    for text in ((unit * MAX_CHARS)[:MAX_CHARS], "{" + (unit * MAX_CHARS)[: MAX_CHARS - 2] + "}", unit * 100_000):
        for _ in range(10):
            normal_form(text)
