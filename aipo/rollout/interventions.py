"""MI-DROP and MI-FORCE: take high-MI tokens away from the decoder, or make it use them (AIPO §4.3, figure 3).

:func:`intervene` is the whole idea, a function of logits; both rollout engines call it. The rest of the file chooses
the tokens: words, as written or in all their spellings (:func:`variant_ids`), or the tokens that a training run scored
highest (:func:`mined_tokens`).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aipo.errors import UserError
from aipo.problems.prompts import NO_TOKEN

Mode = Literal["drop", "force"]
Rule = Literal["nucleus", "rank", "probability"]

Case = Literal["written", "any"]

DEFAULT_WORDS = ("So", "Let", "Hmm", "Okay", "Since", "Therefore", "Then", "To")
"""those that AIPO names (section 4.3)"""

MIN_COUNT = 5
"""A token mined from a run must have been scored this often: the mean of one or two scores is noise."""


@dataclass(frozen=True)
class Intervention:
    """What to do to the next-token distribution, and with which tokens; ids are kept sorted and once each.

    ``drop``: the tokens get probability zero, the others are renormalised.

    ``force``: if one of the tokens is among the likely ones, the most probable of them (of equals, the smallest id)
    is emitted; otherwise nothing changes. Which tokens are likely is the ``rule``'s to say, with ``p`` the
    probability of a token:

    - ``nucleus``: all strictly more probable tokens together have a probability below ``threshold``. The most
      probable token always is in, and where it has ``threshold`` or more it is alone.
    - ``rank``: fewer than ``threshold`` tokens, a whole number, are strictly more probable.
    - ``probability``: ``p >= threshold``.

    The distribution meant is the model's own, before temperature, top-k, top-p and min-p: that is where vLLM applies
    custom processors, and a forced token then is emitted whatever the sampling settings.

    Raises:
        ValueError: for an unknown mode or rule, no tokens, or a threshold that the rule cannot have.
    """

    mode: Mode
    token_ids: tuple[int, ...]
    rule: Rule = "nucleus"
    threshold: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(sorted(set(self.token_ids))))
        if self.mode not in get_args(Mode):
            raise ValueError(f"an intervention's mode is drop or force, not {self.mode!r}")
        if self.rule not in get_args(Rule):
            raise ValueError(f"an intervention's rule is nucleus, rank or probability, not {self.rule!r}")
        if not self.token_ids or self.token_ids[0] < 0:
            raise ValueError(f"an intervention needs token ids of 0 and above, not {self.token_ids}")
        if self.rule == "rank" and not (self.threshold >= 1 and float(self.threshold).is_integer()):
            raise ValueError(f"rule rank needs a whole number of 1 or more as threshold, not {self.threshold}")
        if self.rule != "rank" and not 0 < self.threshold < 1:
            raise ValueError(f"rule {self.rule} needs a threshold between 0 and 1, not {self.threshold}")


def intervene(logits: Tensor, interventions: Sequence[Intervention | None]) -> Tensor:
    """Logits of the distributions that the interventions leave.

    Args:
        logits: (B, V), unscaled; not changed.
        interventions: one for each row, ``None`` for a row that stays as it is.

    Returns:
        (B, V): dropped tokens have -inf; a forced token has 0 and all others of its row -inf.

    Raises:
        ValueError: if the lengths differ, an id is outside the vocabulary, or all of it would be dropped.
    """
    if len(interventions) != len(logits):
        raise ValueError(f"{len(interventions)} interventions for {len(logits)} rows of logits")
    rows_of = defaultdict[Intervention, list[int]](list)
    for row, intervention in enumerate(interventions):
        if intervention is not None:
            rows_of[intervention].append(row)
    if not rows_of:
        return logits
    out = logits.clone()
    for intervention, rows in rows_of.items():
        if intervention.token_ids[-1] >= logits.shape[-1]:
            raise ValueError(f"token id {intervention.token_ids[-1]} is outside the vocabulary of {logits.shape[-1]}")
        ids = torch.tensor(intervention.token_ids, device=logits.device)  # (k,)
        index = torch.tensor(rows, device=logits.device)  # (b,)
        if intervention.mode == "force":
            out[index] = _force(logits[index], ids, intervention.rule, intervention.threshold)
        elif len(ids) == logits.shape[-1]:
            raise ValueError("an intervention cannot drop the whole vocabulary")
        else:
            out[index[:, None], ids] = -math.inf
    return out


def _force(logits: Tensor, ids: Tensor, rule: Rule, threshold: float) -> Tensor:
    """(b, V), (k,) -> (b, V). If any token of the set is likely, then its most probable one is: only that is tested."""
    among = logits[:, ids]  # (b, k)
    best = among.amax(dim=-1, keepdim=True)  # (b, 1)
    chosen = ids.expand_as(among).where(among == best, logits.shape[-1]).amin(dim=-1, keepdim=True)  # (b, 1)
    probability = logits.float().softmax(dim=-1)  # (b, V)
    above = logits > best  # (b, V)
    if rule == "nucleus":
        likely = (probability * above).sum(dim=-1, keepdim=True) < threshold
    elif rule == "rank":
        likely = above.sum(dim=-1, keepdim=True) < threshold
    else:
        likely = probability.gather(-1, chosen) >= threshold
    forced = torch.full_like(logits, -math.inf).scatter(-1, chosen, 0.0)
    return torch.where(likely, forced, logits)


def variant_ids(
    tokenizer: PreTrainedTokenizerBase, words: Iterable[str], *, case: Case = "written"
) -> dict[str, tuple[int, ...]]:
    """Every token that is one of the words, with and without white space before it.

    Args:
        case: ``written`` takes a word as it is written: ``To`` opens a thought, ``to`` stands everywhere. ``any`` also
            in lower case, capitalised and in capitals, but for a word of one letter: ``i`` is an index.

    Returns:
        For each word its token ids; none for a word that the vocabulary has in pieces only. :func:`describe` says so.

    Raises:
        UserError: if no word has a token.
    """
    words = [word.strip() for word in words]
    special = _special_ids(tokenizer)
    ids_of = defaultdict[str, list[int]](list)
    for token, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        if token not in special:
            ids_of[text.lstrip()].append(token)
    forms = {word: _forms(word) if case == "any" else {word} for word in words}
    found = {word: tuple(sorted({i for form in forms[word] for i in ids_of.get(form, ())})) for word in words}
    if not any(found.values()):
        raise UserError(f"the tokenizer has no token for any of {', '.join(words) or 'no words'}: name other words")
    return found


def _forms(word: str) -> set[str]:
    return {word} if len(word) < 2 else {word, word.lower(), word.capitalize(), word.upper()}


def describe(tokenizer: PreTrainedTokenizerBase, variants: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for each word of :func:`variant_ids`, for the log: ``So: 2931 'So', 1644 ' So'``."""
    return [
        f"{word}: " + (", ".join(f"{i} {_text(tokenizer, i)!r}" for i in ids) or "not one token here, left alone")
        for word, ids in variants.items()
    ]


@dataclass(frozen=True)
class MinedToken:
    """A token with its mean MI over ``count`` places of a run; as text, a line for the log."""

    token_id: int
    text: str
    mean_mi: float
    count: int

    def __str__(self) -> str:
        return f"{self.token_id} {self.text!r}: mean MI {self.mean_mi:.4g}, {self.count} times"


def mined_tokens(
    run_folder: str | Path, tokenizer: PreTrainedTokenizerBase, top_k: int, *, min_count: int = MIN_COUNT
) -> list[MinedToken]:
    """The ``top_k`` tokens (or as many as there are) with the highest mean MI in the rollouts that a run wrote.

    Only tokens scored ``min_count`` times or more compete. Special tokens do not, since without its end token a
    completion could not end, and neither do ids for which the tokenizer has no token.

    Args:
        run_folder: of ``train.py``; its ``rollouts/step-*.jsonl`` hold ``tokens`` and ``mi`` (``None`` where not
            scored).

    Raises:
        UserError: if the folder has no rollouts, none of them is scored, no token is left, or the tokens are not this
            tokenizer's.
    """
    if top_k < 1:
        raise UserError(f"the number of tokens to mine must be 1 or more, not {top_k}")
    scores = defaultdict[str, list[float]](list)
    files = sorted(Path(run_folder).glob("rollouts/step-*.jsonl"))
    if not files:
        raise UserError(f"{run_folder} has no rollouts/step-*.jsonl: name the folder of a run that logged rollouts")
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
                pairs = list(zip(row["tokens"], row["mi"], strict=True))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}:{number} is not a rollout of train.py ({error}): remove the file") from error
            for token, score in pairs:
                if score is not None and not str(token).startswith(NO_TOKEN.partition("{")[0]):
                    scores[token].append(score)
    if not scores:
        raise UserError(f"the rollouts in {run_folder} have no MI scores: name a run whose mask or curriculum uses MI")
    vocabulary, special = tokenizer.get_vocab(), _special_ids(tokenizer)
    if unknown := sorted(scores.keys() - vocabulary.keys()):
        raise UserError(f"{run_folder} has tokens that are not of this tokenizer ({unknown[0]!r}): use the run's model")
    mined = [
        MinedToken(vocabulary[token], _text(tokenizer, vocabulary[token]), math.fsum(each) / len(each), len(each))
        for token, each in scores.items()
        if len(each) >= min_count and vocabulary[token] not in special
    ]
    if not mined:
        raise UserError(f"no ordinary token is scored {min_count} times in {run_folder}: name a longer run")
    return sorted(mined, key=lambda token: (-token.mean_mi, token.token_id))[:top_k]


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return str(tokenizer.decode([token_id]))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End and turn tokens, and all others that were added to the learned vocabulary (``<think>``, ``<tool_call>``)."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
