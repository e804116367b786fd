"""What a set of answers is worth: accuracy of k samples, its interval, and accuracy bought per trained token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

LEVEL = 0.95  # of every interval

# One row per problem, one entry per sample, 1 or True where the sample is right. Rows may differ in length.
Correct = Sequence[Sequence[float]] | torch.Tensor


def _rows(correct: Correct) -> list[list[float]]:
    rows = correct.tolist() if isinstance(correct, torch.Tensor) else [list(row) for row in correct]
    if not rows or not all(rows):
        raise ValueError("every metric needs at least one problem and at least one sample of each")
    return rows


def avg_at_k(correct: Correct) -> float:
    """avg@k in [0, 1]: the mean over problems of the share of a problem's k samples that are right."""
    rows = _rows(correct)
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def pass_at_k(correct: Correct, k: int) -> float:
    """pass@k in [0, 1]: the chance that k samples, drawn without replacement, hold a right one.

    Unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), eq. 1: mean of ``1 - C(n-c, k) / C(n, k)`` for n samples
    of which c are right. Raises ValueError where a problem has fewer than k samples.
    """
    rows = _rows(correct)
    fewest = min(map(len, rows))
    if not 1 <= k <= fewest:
        raise ValueError(f"k must lie in 1..{fewest}, the fewest samples of a problem; got {k}")

    def chance(row: list[float]) -> float:
        n, c = len(row), round(sum(row))
        return 1.0 - math.comb(n - c, k) / math.comb(n, k)

    return sum(map(chance, rows)) / len(rows)


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: Correct) -> float:
    """maj@k in [0, 1]: the expected share of problems whose most frequent answer is right.

    ``answers[i][j]`` is what sample j of problem i answered and ``correct[i][j]`` whether that is right. A sample votes
    for the exact text of its answer (normalise before); None, no answer found, does not vote. Ties are shared: a
    problem scores what drawing one of its tied answers at random would score on average. Where the verifier judged
    equal answers differently, the answer counts with its share of right judgements.
    """
    rows = _rows(correct)
    if [len(row) for row in answers] != [len(row) for row in rows]:
        raise ValueError("answers and correct must have the same problems and samples")

    def score(given: Sequence[str | None], right: list[float]) -> float:
        votes = Counter(answer for answer in given if answer is not None)
        most = max(votes.values(), default=0)
        # Tied answers have the same number of votes, so the mean over their samples is the mean over the answers.
        winners = [r for answer, r in zip(given, right) if answer is not None and votes[answer] == most]
        return sum(winners) / len(winners) if winners else 0.0

    return sum(map(score, answers, rows)) / len(rows)


def best_point(points: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Of (step, value) the highest, the earliest of equals; as of checkpoints, not step 0 if there is a later one."""
    trained = [point for point in points if point[0] > 0] or points
    return max(trained, key=lambda point: point[1], default=None)


def trained_share(log: Sequence[Mapping[str, Any]]) -> float | None:
    """OTF in [0, 1] from the lines of a run's ``metrics.jsonl``; None without a step that an update was made of.

    Tokens trained on / completion tokens of the rollouts that the update read.
    """
    return _share(log, "mask/otf", "rollout/used_tokens")


def cost_share(log: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens trained on / all tokens generated for them, in [0, 1]: with dropped groups and continuations."""
    return _share(log, "mask/cost_share", "rollout/tokens")


def _share(log: Sequence[Mapping[str, Any]], share: str, weight: str) -> float | None:
    steps = [line for line in log if line.get(share) is not None and line.get(weight) is not None]
    tokens = sum(line[weight] for line in steps)
    return sum(line[share] * line[weight] for line in steps) / tokens if tokens else None


def training_efficiency(mag: float, otf: float) -> float:
    """TES = MAG / (OTF / 100): accuracy gained for the share of tokens trained on.

    ``mag`` is the gain over the frozen backbone in percentage points, ``otf`` the share of the completion tokens
    of the update that was trained on in percent, 0 < otf <= 100 (else ValueError).
    """
    if not 0 < otf <= 100:
        raise ValueError(f"otf is a percentage above 0 and at most 100; got {otf}")
    return mag / (otf / 100)


def bootstrap_interval(
    scores: Sequence[float], seed: int, *, level: float = LEVEL, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of ``scores``, one score per problem.

    Problems are resampled, not samples: samples of one problem are not independent. When all scores are equal the
    interval has no width, however few they are. The same seed gives the same interval.
    """
    values = np.asarray(scores, dtype=np.float64)  # (problems,)
    if values.ndim != 1 or not values.size:
        raise ValueError("scores must be a non-empty list with one number per problem")
    rng = np.random.default_rng(seed)
    means = _resampled_means(values, rng, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(values: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Mean of each of the draws of all (n,) values with replacement, some at a time to hold little. (resamples,)"""
    at_once = max(1, 1_000_000 // values.size)
    sizes = [(min(at_once, resamples - done), values.size) for done in range(0, resamples, at_once)]
    return np.concatenate([values[rng.integers(values.size, size=size)].mean(axis=1) for size in sizes])


@dataclass(frozen=True)
class Difference:
    """Mean scores of two sides over the same problems, the 95 % interval of b - a, and its two-sided p."""

    a: float
    b: float
    low: float
    high: float
    p: float
    problems: int

    @property
    def value(self) -> float:
        return self.b - self.a

    @property
    def real(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000) -> Difference:
    """Compare two sets of scores of the same problems, ``a[i]`` and ``b[i]`` of one problem.

    Problems are resampled and both scores go with them, so what makes a problem hard for both does not count as noise.
    ``p`` is twice the smaller share of resamples whose mean difference is not above 0, or not below, with one resample
    added to each count (a p of 0 would claim more than the resamples can show); at most 1.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b need a score of each problem, at least one; got {len(a)} and {len(b)}")
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)  # (problems,) each
    differences = right - left  # (problems,)
    means = _resampled_means(differences, np.random.default_rng(0), resamples)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    smaller = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (smaller + 1) / (resamples + 1))
    return Difference(float(left.mean()), float(right.mean()), float(low), float(high), p, differences.size)


@dataclass(frozen=True)
class Accuracy:
    """avg@k in [0, 1] with its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float
    problems: int
    samples: int  # over all problems

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def accuracy_summary(correct: Correct, seed: int = 0) -> Accuracy:
    """avg@k of ``correct`` (problems × samples) with its interval."""
    rows = _rows(correct)
    low, high = bootstrap_interval([sum(row) / len(row) for row in rows], seed)
    return Accuracy(avg_at_k(rows), low, high, problems=len(rows), samples=sum(map(len, rows)))


def error_bounds(answer_entropy: float, information: float, answers: int) -> tuple[float, float]:
    """Least and largest probability of error that the information in the hidden states allows (eq. 8 and 9).

    Fano's inequality, p_e >= (H(y) - I - 1) / log2(|y| - 1), and p_e <= (H(y) - I) / 2. The paper prints the second
    without the half that its own proof has; both hold for logarithms to base 2 alone.

    Args:
        answer_entropy: H(y) in bits.
        information: I_{1:T} of eq. 7 in bits, at most H(y).
        answers: |y|, possible answers, at least 3.

    Returns:
        Both bounds, cut to [0, 1].
    """
    if answers < 3 or not 0 <= information <= answer_entropy <= math.log2(max(answers, 1)) + 1e-9:
        raise ValueError(
            f"needs 3 answers or more and 0 <= information <= entropy <= log2(answers) bits, got {answers}, "
            f"{information} and {answer_entropy}"
        )
    left = answer_entropy - information
    return min(max((left - 1) / math.log2(answers - 1), 0.0), 1.0), min(left / 2, 1.0)


# -- how different the completions of a question are -------------------------------------------------------------------


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all completions together / their number (Li et al. 2016); NaN where there is none."""
    every = [gram for tokens in completions for gram in ngrams(tokens, n)]
    return len(set(every)) / len(every) if every else math.nan


def repetition(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of a completion's n-grams that it has said before, mean over those that have any; NaN where none has."""
    shares = [1 - distinct([tokens], n) for tokens in completions if len(tokens) >= n]
    return sum(shares) / len(shares) if shares else math.nan


def self_bleu(completions: Sequence[Sequence[int]], order: int = 4) -> float:
    """BLEU of each completion against all others, mean (Zhu et al. 2018); 1 is all alike, 0 nothing in common.

    BLEU of Papineni et al. 2002 without smoothing: geometric mean of the clipped precisions of 1- to ``order``-grams,
    of those a short completion has, times the brevity penalty by the closest length, the shorter of two. NaN for fewer
    than two completions with tokens.
    """
    said = [tokens for tokens in completions if len(tokens)]
    if len(said) < 2:
        return math.nan
    log_precisions: list[list[float]] = [[] for _ in said]
    for n in range(1, order + 1):
        counts = [Counter(ngrams(tokens, n)) for tokens in said]
        most: dict[tuple[int, ...], tuple[int, int, int]] = {}  # n-gram -> who has it most often, how often, next most
        for who, count in enumerate(counts):
            for gram, times in count.items():
                first, best, second = most.get(gram, (-1, 0, 0))
                most[gram] = (who, times, best) if times > best else (first, best, max(second, times))
        for who, count in enumerate(counts):
            if total := sum(count.values()):
                others = ((times, most[gram]) for gram, times in count.items())
                shared = sum(min(times, second if first == who else best) for times, (first, best, second) in others)
                log_precisions[who].append(math.log(shared / total) if shared else -math.inf)
    scores = []
    for who, (tokens, logs) in enumerate(zip(said, log_precisions)):
        lengths = [len(other) for i, other in enumerate(said) if i != who]
        closest = min(lengths, key=lambda length: (abs(length - len(tokens)), length))
        scores.append(math.exp(min(0.0, 1 - closest / len(tokens)) + sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def diversity(completions: Sequence[Sequence[int]]) -> dict[str, float]:
    """The measures above of one question's completions, token ids; none where no two are long enough for all."""
    if sum(len(tokens) >= 4 for tokens in completions) < 2:
        return {}
    return {
        "distinct_1": distinct(completions, 1),
        "distinct_4": distinct(completions, 4),
        "repetition_4": repetition(completions, 4),
        "self_bleu": self_bleu(completions),
    }
