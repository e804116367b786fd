"""Chat-templated token ids out: prompts, gold answers, and the tokens that end a completion."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from aipo.errors import UserError
from aipo.problems.datasets import Problem

BLOCK = "<think>", "</think>"
GoldText = Literal["answer", "boxed", "question_answer", "solution"]


class Prompter:
    """Turns questions into prompts: system line, worked (user, assistant) turns, the question and ``suffix``.

    ``suffixes`` take the place of ``suffix`` for problems of these origins. ``thinking`` reaches the template as
    ``enable_thinking``; templates that do not know it ignore it. ``end_ids`` are the tokens after which a completion is
    over; ``opening`` is what the template itself has already opened of the reply, ``<think>`` or nothing, whatever
    system line, examples and question say.
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
        suffixes: Mapping[str, str] | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"model {tokenizer.name_or_path} has no chat template: choose an instruction-tuned model, "
                "or put a chat_template.jinja into its folder"
            )
        self.tokenizer = tokenizer
        self.suffix, self.suffixes = suffix or "", suffixes or {}
        self.thinking = thinking
        self.max_prompt_tokens = max_prompt_tokens
        # where they are special tokens, decoding would skip them
        self._marks = {
            i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content in BLOCK
        }
        self.turns: list[dict[str, str]] = []
        if system is not None:
            self.turns.append({"role": "system", "content": system})
        for user, assistant in examples:
            self.turns.append({"role": "user", "content": user})
            self.turns.append({"role": "assistant", "content": assistant})
        try:
            # some templates open the thinking block themselves: a completion then begins inside it
            self.opening = BLOCK[0] if BLOCK[0] in self._header().rpartition(BLOCK[1])[2] else ""
            self.end_ids = end_token_ids(tokenizer, generation_config)
        except TemplateError as error:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} refuses this prompt ({error}): "
                "try it without a system prompt or examples"
            ) from error

    def encode(self, question: str, origin: str = "") -> list[int]:
        """Token ids of the whole prompt, up to and including the header of the assistant's turn."""
        return self._encode([(question, origin)])[0]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A completion as text, with what the prompt had already opened of it and without special tokens but those of
        the thinking block."""
        pieces, ids = [self.opening], list(token_ids)
        for is_mark, piece in groupby(ids, key=self._marks.__contains__):
            if is_mark:
                pieces += [self._marks[i] for i in piece]
            else:
                pieces.append(str(self.tokenizer.decode(list(piece), skip_special_tokens=True)))
        return "".join(pieces)

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
        prompts = self._encode([(p.question, p.origin) for p in problems])
        kept = [p for p, prompt in zip(problems, prompts) if len(prompt) <= self.max_prompt_tokens]
        if not kept:
            raise UserError(
                f"all {len(problems)} questions are longer than the limit of {self.max_prompt_tokens} prompt tokens: "
                "raise data.max_prompt_tokens or shorten data.examples"
            )
        return kept, len(problems) - len(kept)

    def _header(self) -> str:
        """What the template adds for the assistant's turn: the text of the prompt from where it differs from one
        without that turn."""
        turns = [*self.turns, {"role": "user", "content": self.suffix}]
        bare, whole = (
            str(
                self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=added, enable_thinking=self.thinking, tokenize=False
                )
            )
            for added in (False, True)
        )
        # a few templates end a conversation without that turn in another way
        same = next((i for i, (a, b) in enumerate(zip(bare, whole)) if a != b), min(len(bare), len(whole)))
        return whole[same:]

    def _encode(self, questions: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Prompts of (question, origin)."""
        asked = [question + self.suffixes.get(origin, self.suffix) for question, origin in questions]
        # all at once: the tokenizer then works on several cores
        ids = self.tokenizer.apply_chat_template(
            [[*self.turns, {"role": "user", "content": content}] for content in asked],
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


def token_names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Tokens as the tokenizer spells them; :data:`NO_TOKEN` where a model has more rows than it has tokens."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [NO_TOKEN.format(i) if name is None else name for i, name in zip(ids, names)]


NO_TOKEN = "<no token {}>"
