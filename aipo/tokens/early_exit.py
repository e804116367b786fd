"""IAPO's information gain of a token (arXiv 2602.19049): how far it lowers the entropy of the answer.

The answer's entropy after a prefix o_<t is that of the token which follows an *early exit*: the prefix, then a postfix
that ends the reasoning and opens the answer. A rollout of T tokens has T + 1 such prefixes. They are laid out as one
tree in one row: the rollout stands once, and every postfix branches off at its prefix, at the positions and with the
attention that it would have in a sequence of its own. So the entropies are exact, one forward pass gives many of them
without a key-value cache, and ZeRO-3 sees forward passes like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aipo.layout import MicroBatch, TokenIds

POSTFIX = "\nThe answer is \\boxed{"
THINKING_POSTFIX = "\n</think>\n\n**Final Answer**\n\\boxed{"
ROOT = -1  # the node above all sequences of a tree


def postfix_ids(tokenizer: PreTrainedTokenizerBase, *, thinking: bool) -> list[int]:
    """Token ids of the early exit: :data:`THINKING_POSTFIX` or :data:`POSTFIX`."""
    return tokenizer.encode(THINKING_POSTFIX if thinking else POSTFIX, add_special_tokens=False)


def early_exit_trees(
    prompts: TokenIds,
    completions: TokenIds,
    postfix: Sequence[int],
    *,
    stride: int,
    budget: int,
    smoothed: bool = False,
) -> list[ExitTree]:
    """Every early exit that the scored tokens need, in micro-batches of one row with at most ``budget`` tokens.

    Scored are every ``stride``-th token of a completion, from its first, and its last; each needs the prefixes
    before and after it and, ``smoothed``, the one before those. One exit always fits, whatever the budget.

    Returns:
        Trees of N exits each, small until :meth:`ExitTree.micro_batch` is called.
    """
    if stride < 1 or not postfix:
        raise ValueError(f"stride must be at least 1 and the postfix not empty, got {stride} and {list(postfix)}")
    trees: list[ExitTree] = []
    # prompts that begin alike come one after another and share what they begin with
    for row in sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), -len(completions[i]))):
        prompt, completion = list(prompts[row]), list(completions[row])
        left = _prefixes(len(completion), stride, smoothed)
        while left:
            if not trees:
                trees.append(ExitTree())
            tree = trees[-1]
            # The longest prefixes first: a row that is cut off then ends at the shortest trunk that it can have.
            trunk = prompt + completion[: left[-1]]
            fit = (budget - len(tree.tokens) - tree.missing(trunk)) // len(postfix)
            if fit < len(left) and tree.tokens:  # not all of them: what is left of the row would repeat the trunk
                trees.append(ExitTree())
                continue
            path = [ROOT, *tree.grow(trunk)]
            for prefix in left[-max(fit, 1) :]:
                end = tree.grow(postfix, path[len(prompt) + prefix])[-1]
                tree.exits.append((row, prefix, end))
            del left[-max(fit, 1) :]
    return trees


def information_gain(
    exits: Iterable[tuple[Tensor, Tensor]], entropies: Iterable[Tensor], lengths: Tensor, *, smoothed: bool = False
) -> Tensor:
    """s_t = H(y | q, o_<t) - H(y | q, o_<=t), s_it of IAPO, in nats; ``smoothed`` as :func:`smoothed_gain`.

    Args:
        exits: for each tree the completion that an exit is of and the tokens before it, (N,) and (N,).
        entropies: (N,) of each, of the full vocabulary behind the postfix.
        lengths: (B,) of all completions.

    Returns:
        (B, T) float32, NaN where a token was not scored.
    """
    width = max(int(lengths.max()) if len(lengths) else 0, 1)
    answer = torch.full((len(lengths), width + 1), float("nan"))  # (B, T + 1) H(y | q, o_<t)
    for (rows, prefixes), entropy in zip(exits, entropies):
        answer[rows.cpu(), prefixes.cpu()] = entropy.float().cpu()
    return smoothed_gain(answer) if smoothed else answer[:, :-1] - answer[:, 1:]


def cumulative_information(gain: Tensor) -> Tensor:
    """I_{1:T} of eq. 7 along each completion: the sum of its tokens' differences (B, T), unscored ones (NaN) left out.
    (B,)

    With every token scored it is what the answer's entropy fell by from the question to the end; its mean over
    completions is the mutual information of answer and completion, by the chain rule, that the bounds of eq. 8 and 9
    are made of (in bits there).
    """
    return gain.nansum(1)


def smoothed_gain(entropy: Tensor) -> Tensor:
    """(H_t + H_{t-1}) / 2 - H_{t+1}, as the published code of IAPO has it, with 0 for what stands before the first.

    Args:
        entropy: (B, T + 1) H_t before each token, and after the last.

    Returns:
        (B, T)
    """
    earlier = torch.nn.functional.pad(entropy[:, :-2], (1, 0))  # (B, T)
    return (entropy[:, :-1] + earlier) / 2 - entropy[:, 1:]


def _prefixes(length: int, stride: int, smoothed: bool) -> list[int]:
    """Prefix lengths, ascending, before and after every scored token of a completion; and one before those."""
    scored = {*range(0, length, stride), length - 1} if length else set()
    earliest = -1 if smoothed else 0
    return sorted({token + place for token in scored for place in range(earliest, 2)} - {-1})


class ExitTree:
    """Token sequences that share what they begin with. A node is a token; it attends to its ancestors and itself."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []  # a parent comes before its children
        self.depths: list[int] = []
        self.children: dict[tuple[int, int], int] = {}  # (node, token) -> node
        self.exits: list[tuple[int, int, int]] = []  # completion, prefix length, node of the last postfix token

    def grow(self, ids: Sequence[int], node: int = ROOT) -> list[int]:
        """Make ``ids`` stand below ``node``; returns their nodes."""
        path = []
        for token in ids:
            parent, node = node, self.children.setdefault((node, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(0 if parent == ROOT else self.depths[parent] + 1)
            path.append(node)
        return path

    def missing(self, ids: Sequence[int]) -> int:
        """How many tokens growing ``ids`` from the root would add."""
        node = ROOT
        for i, token in enumerate(ids):
            if (node, token) not in self.children:
                return len(ids) - i
            node = self.children[node, token]
        return 0

    def micro_batch(self) -> MicroBatch:
        """``predictors`` (N,) stands on the last postfix token of each exit, ``rows`` (N,) says of which completion it
        is and ``lengths`` (N,) how many of its tokens stand before the postfix; ``targets`` are all 0."""
        sees = np.eye(len(self.tokens), dtype=bool)  # (s, s)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                sees[node, : parent + 1] = sees[parent, : parent + 1]
        rows, prefixes, ends = torch.tensor(self.exits, dtype=torch.long).unbind(1)  # (N,) each
        return MicroBatch(
            rows=rows,
            input_ids=torch.tensor([self.tokens]),
            position_ids=torch.tensor([self.depths]),
            predictors=ends,
            targets=torch.zeros_like(ends),
            lengths=prefixes,
            attention_mask=torch.from_numpy(sees)[None, None],  # (1, 1, s, s)
        )
