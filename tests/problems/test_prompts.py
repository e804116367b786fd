from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from aipo.errors import UserError
from aipo.problems.datasets import Problem
from aipo.problems.prompts import Prompter, end_token_ids, wrong_golds
from aipo.verify import extract_answer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's way: thinking is switched off by an empty block at the start of the answer
THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
OPENS = THINKING.replace("{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def tokenizer(template: str | None = CHATML, eos: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, name_or_path="the/model")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def prompter(tok: PreTrainedTokenizerFast, **changes: Any) -> Prompter:
    settings: dict[str, Any] = {
        "system": "Be brief.",
        "examples": [("1 + 1 =", "2")],
        "suffix": " Box it.",
        "thinking": True,
        "max_prompt_tokens": 1000,
    }
    return Prompter(tok, **(settings | changes))


def test_prompt_is_the_template_filled_in() -> None:
    tok = tokenizer()
    assert tok.decode(prompter(tok).encode("3 + 4 =")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3 + 4 = Box it.<|im_end|>\n<|im_start|>assistant\n"
    )
    bare = prompter(tok, system=None, examples=[], suffix=None)
    assert tok.decode(bare.encode("hi")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_thinking_reaches_templates_that_know_it() -> None:
    on, off = (tokenizer(THINKING) for _ in range(2))
    with_thinking = on.decode(prompter(on, thinking=True).encode("hi"))
    assert off.decode(prompter(off, thinking=False).encode("hi")) == f"{with_thinking}<think>\n\n</think>\n\n"
    plain = tokenizer()
    assert prompter(plain, thinking=True).encode("hi") == prompter(plain, thinking=False).encode("hi")


@pytest.mark.parametrize(("thinking", "opening"), [(True, "<think>"), (False, "")])
def test_a_thinking_block_that_the_template_opens(thinking: bool, opening: str) -> None:
    assert prompter(tokenizer(OPENS), thinking=thinking).opening == opening
    assert prompter(tokenizer(THINKING), thinking=thinking).opening == ""


@pytest.mark.parametrize("template", [CHATML, THINKING, OPENS])
def test_what_a_prompt_says_of_thinking_opens_no_block(template: str) -> None:
    says = {"system": "Think in <think> tags.", "examples": [("<think>?", "<think> 1")], "suffix": " <think>"}
    for thinking in (True, False):
        plain = prompter(tokenizer(template), thinking=thinking)
        assert prompter(tokenizer(template), thinking=thinking, **says).opening == plain.opening


@pytest.mark.parametrize("special", [True, False])
def test_the_marks_of_the_block_are_kept_and_other_special_tokens_are_not(special: bool) -> None:
    tok = tokenizer(OPENS)
    tok.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    made = prompter(tok)
    ids = tok.encode("2 — maybe</think>\n\n\\boxed{3}<|im_end|>", add_special_tokens=False)
    assert ids.count(tok.convert_tokens_to_ids("</think>")) == 1
    assert made.decode(ids) == "<think>2 — maybe</think>\n\n\\boxed{3}"
    assert extract_answer(made.decode(ids)) == "3"
    assert extract_answer(made.decode(ids[:12])) is None


@pytest.mark.parametrize(
    ("gold_text", "text"),
    [
        ("answer", "\\frac{1}{2}"),
        ("boxed", "\\boxed{\\frac{1}{2}}"),
        ("question_answer", "Half of 1?\n\\frac{1}{2}"),
        ("solution", "Divide by 2."),
    ],
)
def test_gold_has_no_special_tokens(gold_text: Any, text: str) -> None:
    tok = tokenizer()
    ids = prompter(tok).encode_gold(Problem("1", "Half of 1?", "\\frac{1}{2}", solution="Divide by 2."), gold_text)
    assert tok.decode(ids) == text
    assert not set(ids) & set(tok.all_special_ids)


def test_wrong_golds_are_another_answer_each() -> None:
    problems = [Problem(f"{n}", "?", answer) for n, answer in enumerate("1112113111")]
    wrong = wrong_golds(problems, seed=0)
    answers = {problem.id: problem.answer for problem in problems}
    assert wrong.keys() == answers.keys()
    assert all(problem.answer != answers[question] for question, problem in wrong.items())
    assert wrong == wrong_golds(problems, seed=0)
    assert len({str(wrong_golds(problems, seed=seed)) for seed in range(9)}) > 1
    distinct = [Problem(f"{n}", "?", f"{n}") for n in range(20)]
    assert len({problem.id for problem in wrong_golds(distinct, 1).values()}) == 20  # then no gold is used twice
    with pytest.raises(UserError, match=r"mi.gold_control: shuffled needs questions of different answers"):
        wrong_golds(problems[:3], seed=0)


def test_long_questions_are_dropped_with_a_count() -> None:
    tok = tokenizer()
    fits = len(prompter(tok).encode("x" * 10))
    problems = [Problem(str(n), "x" * n, "1") for n in (9, 10, 11, 400)]
    kept, dropped = prompter(tok, max_prompt_tokens=fits).filter(problems)
    assert ([p.id for p in kept], dropped) == (["9", "10"], 2)
    with pytest.raises(UserError, match="all 4 questions are longer than the limit of 5"):
        prompter(tok, max_prompt_tokens=5).filter(problems)
    assert prompter(tok).filter([]) == ([], 0)


def test_model_without_a_template() -> None:
    with pytest.raises(UserError, match="the/model has no chat template"):
        prompter(tokenizer(None))


def test_template_that_refuses_the_turns() -> None:
    with pytest.raises(UserError, match=r"the/model refuses this prompt \(no system role\)"):
        prompter(tokenizer(REFUSES_SYSTEM))
    assert prompter(tokenizer(REFUSES_SYSTEM), system=None).encode("hi")


def test_end_ids_come_from_tokenizer_generation_config_and_template() -> None:
    tok = tokenizer()
    eos, turn_end = (tok.get_vocab()[token] for token in ("<|endoftext|>", "<|im_end|>"))
    assert end_token_ids(tok) == {eos, turn_end}
    assert end_token_ids(tok, GenerationConfig(eos_token_id=[3, 4])) == {eos, turn_end, 3, 4}
    assert end_token_ids(tok, GenerationConfig(eos_token_id=5)) == {eos, turn_end, 5}
    assert prompter(tok).end_ids == {eos, turn_end}
    assert end_token_ids(tokenizer(None)) == {eos}
    without_turn_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_token_ids(tokenizer(without_turn_end)) == {eos}  # a newline is text, not an end
    with pytest.raises(UserError, match="no token that ends"):
        end_token_ids(tokenizer(without_turn_end, eos=None))
