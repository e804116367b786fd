from hypothesis import given
from hypothesis import strategies as st

from aipo.problems.contamination import Overlap, find_overlaps, words
from aipo.problems.datasets import Problem, render_options


def problem(text: str, answer: str = "1", id: str = "x") -> Problem:
    return Problem(id, text, answer)


def test_words_forget_layout_case_and_punctuation() -> None:
    assert words(r"Find \(\left(x_1 + 2\right)\), \quad or $\frac{1}{2}$?") == (
        *("find", "x", "1", "2", "or"),
        *("frac", "1", "2"),
    )
    assert words("求 $\\dots$ 最小值") == ("求", "最", "小", "值")
    assert words(r"\lefty \dotsm") == ("lefty",)  # only whole commands of layout go
    assert words("?!") == ()


def test_words_of_every_script() -> None:
    assert words("Найдите x_1") == ("найдите", "x", "1")
    assert words("한국어 문제 12개") == ("한국어", "문제", "12개")
    assert words("ペンは々、𠀀 2本") == ("ペ", "ン", "は", "々", "𠀀", "2", "本")
    assert words("größe") == ("größe",)


def test_questions_with_the_same_numbers_are_not_the_same() -> None:
    apples = problem("사과 3개와 배 5개가 있다. 모두 몇 개인가?")
    trains = problem("기차가 3시간 동안 5번 멈춘다. 언제 도착하는가?")
    assert find_overlaps([trains], [apples]) == []
    russian = problem("Найдите сумму всех корней уравнения")
    assert [o.share for o in find_overlaps([russian], [russian])] == [1.0]


def test_half_of_the_grams_is_enough_and_less_is_not() -> None:
    # 11 words have 4 grams of 8; the first 9 words hold 2 of them, the first 8 hold 1
    question = problem("a b c d e f g h i j k")
    nine, eight = problem("A, b c d e f g h i!", id="nine"), problem("a b c d e f g h", id="eight")
    assert find_overlaps([eight, nine], [question]) == [Overlap(nine, question, 0.5)]


def test_half_must_stand_in_one_training_question() -> None:
    question = problem("a b c d e f g h i j k")
    assert (
        find_overlaps([problem("a b c d e f g h"), problem("b c d e f g h x"), problem("d e f g h i j k")], [question])
        == []
    )


def test_a_short_question_matches_as_a_whole_only() -> None:
    question = problem("What is $2+2$?")
    whole = problem("what is 2 - 2", id="whole")
    longer = problem("what is 2 2 and what is 3 3 please")
    assert [o.training.id for o in find_overlaps([longer, whole, problem("what is 2")], [question])] == ["whole"]
    assert find_overlaps([problem("?")], [problem("!")]) == []


def test_pairs_are_in_order_and_know_whether_answers_agree() -> None:
    first, second = problem("one two three", "1", "e1"), problem("four five six", "2", "e2")
    training = [
        problem("four five six", "2", "t1"),
        problem("one two three", "9", "t2"),
        problem("ONE two three", "1", "t3"),
    ]
    found = [(o.evaluation.id, o.training.id, o.same_answer) for o in find_overlaps(training, [first, second])]
    assert found == [("e1", "t2", False), ("e1", "t3", True), ("e2", "t1", True)]


def test_options_are_not_compared() -> None:
    options = ("red", "blue")
    choice = Problem("c", "What colour?" + render_options(options), "A", "choice", options=options)
    assert [o.share for o in find_overlaps([problem("what colour")], [choice])] == [1.0]


def brute_force(train: str, evaluation: str) -> float:
    """Share by comparing every window of one with every window of the other."""
    ours, theirs = train.split(), evaluation.split()
    if len(theirs) < 8:
        return float(ours == theirs and bool(theirs))
    windows = []
    for i in range(len(theirs) - 7):
        if theirs[i : i + 8] not in windows:
            windows.append(theirs[i : i + 8])
    hits = [any(ours[j : j + 8] == window for j in range(len(ours) - 7)) for window in windows]
    return sum(hits) / len(hits)


texts = st.lists(
    st.one_of(
        st.lists(st.sampled_from("ab"), max_size=14).map(" ".join),
        st.sampled_from(["a b a b a b a b a b", "a a a a a a a a a a b", "b a b"]),
    ),
    max_size=5,
)


@given(training=texts, evaluation=texts)
def test_agrees_with_brute_force(training: list[str], evaluation: list[str]) -> None:
    ours = [problem(text, id=f"t{i}") for i, text in enumerate(training)]
    theirs = [problem(text, id=f"e{i}") for i, text in enumerate(evaluation)]
    found = {(o.evaluation.id, o.training.id): o.share for o in find_overlaps(ours, theirs)}
    shares = {(e.id, t.id): brute_force(t.question, e.question) for e in theirs for t in ours}
    assert found == {pair: share for pair, share in shares.items() if share >= 0.5}
