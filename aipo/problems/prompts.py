"""Chat-templated token ids out: prompts, gold answers, and the tokens that end a completion."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from aipo.errors import UserError
from aipo.problems.datasets import Problem

GoldText = Literal["answer", "boxed", "question_answer", "solution"]


class Prompter:
    """Turns questions into prompts: system line, worked (user, assistant) turns, the question and ``suffix``.

    ``thinking`` reaches the template as ``enable_thinking``; templates that do not know it ignore it.
    ``end_ids`` are the tokens after which a completion is over; ``opening`` is what the prompt has already opened of
    the reply, ``<think>`` or nothing.
    Raises ``UserError`` for a tokenizer without a chat template, or one whose template refuses these turns.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None,
        examples: Sequence[tuple[str, str]],
        suffix: str | None,
        thinking: bool,
        max_prompt_tokens: int,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"model {tokenizer.name_or_path} has no chat template: choose an instruction-tuned model, "
                "or put a chat_template.jinja into its folder"
            )
        self.tokenizer = tokenizer
        self.suffix = suffix or ""
        self.thinking = thinking
        self.max_prompt_tokens = max_prompt_tokens
        self.turns: list[dict[str, str]] = []
        if system is not None:
            self.turns.append({"role": "system", "content": system})
        for user, assistant in examples:
            self.turns.append({"role": "user", "content": user})
            self.turns.append({"role": "assistant", "content": assistant})
        try:
            prompt = str(tokenizer.decode(self.encode("")))
            # some templates open the thinking block themselves: a completion then begins inside it
            self.opening = "<think>" if "<think>" in prompt.rpartition("</think>")[2] else ""
            self.end_ids = end_token_ids(tokenizer, generation_config)
        except TemplateError as error:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} refuses this prompt ({error}): "
                "try it without a system prompt or examples"
            ) from error

    def encode(self, question: str) -> list[int]:
        """Token ids of the whole prompt, up to and including the header of the assistant's turn."""
        return self._encode([question])[0]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A completion as text, with what the prompt had already opened of it and without special tokens."""
        return f"{self.opening}{self.tokenizer.decode(list(token_ids), skip_special_tokens=True)}"

    def encode_gold(self, problem: Problem, gold_text: GoldText = "answer") -> list[int]:
        """Token ids of the gold text alone, without template or special tokens (``mi.gold_text``).

        Raises ``UserError`` for a problem without the solution that is asked for.
        """
        if gold_text == "solution" and not problem.solution:
            raise UserError(
                f"mi.gold_text: solution, and the row of question {problem.id!r} has no field 'solution': add it, or "
                "set mi.gold_text: answer"
            )
        text = {
            "answer": problem.answer,
            "boxed": rf"\boxed{{{problem.answer}}}",
            "question_answer": f"{problem.question}\n{problem.answer}",
            "solution": problem.solution,
        }[gold_text]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def filter(self, problems: Sequence[Problem]) -> tuple[list[Problem], int]:
        """Problems with prompts of at most ``max_prompt_tokens``, and how many had more. UserError if none is left."""
        if not problems:
            return [], 0
        prompts = self._encode([p.question for p in problems])
        kept = [p for p, prompt in zip(problems, prompts) if len(prompt) <= self.max_prompt_tokens]
        if not kept:
            raise UserError(
                f"all {len(problems)} questions are longer than the limit of {self.max_prompt_tokens} prompt tokens: "
                "raise data.max_prompt_tokens or shorten data.examples"
            )
        return kept, len(problems) - len(kept)

    def _encode(self, questions: Sequence[str]) -> list[list[int]]:
        # all at once: the tokenizer then works on several cores
        ids = self.tokenizer.apply_chat_template(
            [[*self.turns, {"role": "user", "content": question + self.suffix}] for question in questions],
            add_generation_prompt=True,
            enable_thinking=self.thinking,
            return_dict=False,
        )
        return cast("list[list[int]]", ids)


def wrong_golds(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """For each question's id another question, of another answer, drawn by the seed.

    Raises ``UserError`` if all questions have one answer.
    """
    order = random.Random(seed).sample(list(problems), len(problems))
    if len({problem.answer for problem in order}) < 2:
        raise UserError("mi.gold_control: shuffled needs questions of different answers; those of data.train have one")
    wrong: dict[str, Problem] = {}
    other = order[0]
    for problem in reversed(order + order):  # around the circle: the next of another answer
        if other.answer == problem.answer:
            other = wrong.get(other.id, other)
        wrong[problem.id], other = other, problem
    return wrong


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's and the generation config's, and the template's end of a turn.

    Models disagree on where they say it: a base tokenizer's EOS may be ``<|endoftext|>`` while turns end with
    ``<|im_end|>``, so the turn end is read off a rendered assistant turn.
    """
    ids: set[int] = set()
    for eos in (tokenizer.eos_token_id, generation_config.eos_token_id if generation_config else None):
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.chat_template is not None:
        reply = "the reply"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": reply}]
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
        after = tokenizer.encode(rendered.rpartition(reply)[2], add_special_tokens=False)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if after and after[0] in special:
            ids.add(after[0])
    if not ids:
        raise UserError(f"model {tokenizer.name_or_path} names no token that ends a completion: set its eos_token")
    return frozenset(ids)
