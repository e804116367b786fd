"""What needs no vLLM; the engine itself is tested end to end."""

from __future__ import annotations

import pytest
import torch

from aipo.rollout.vllm import checkpoint_stream

WEIGHTS = [("model.embed_tokens.weight", torch.randn(3, 2)), ("model.norm.weight", torch.randn(2))]
NAMES = [name for name, _ in WEIGHTS]


@pytest.mark.parametrize("alias", [[], [("lm_head.weight", WEIGHTS[0][1])]], ids=["once", "under both names"])
def test_a_tied_head_is_named_behind_all_that_it_is_packed_from(alias):
    """Else a machine on which vLLM packs the head goes on with the old one."""
    sent = list(checkpoint_stream([*alias, *WEIGHTS], dtype=torch.bfloat16, tied=True, expected=NAMES))
    assert [name for name, _ in sent] == [*NAMES, "lm_head.weight"]
    assert torch.equal(sent[-1][1], WEIGHTS[0][1].bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in sent)


def test_an_untied_head_is_a_weight_and_one_that_is_missing_is_named():
    head = ("lm_head.weight", torch.randn(3, 2))
    sent = dict(checkpoint_stream([*WEIGHTS, head], dtype=torch.float32, tied=False, expected=[*NAMES, head[0]]))
    assert torch.equal(sent[head[0]], head[1])
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        list(checkpoint_stream(WEIGHTS, dtype=torch.float32, tied=False, expected=[*NAMES, head[0]]))
