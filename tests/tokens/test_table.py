"""Signals of a real tiny policy against plain forwards, and what the rules make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aipo.advantage import (
    effective_token_ratio,
    entropy_quadrants,
    gini,
    information_advantages,
    reallocate_by_entropy,
    subtract_token_baseline,
    weight_tokens,
)
from aipo.config import Config, load_config
from aipo.config.base import Measured
from aipo.config.sections import AdvantageConfig
from aipo.layout import filler, micro_batches
from aipo.model.adapters import add_adapters
from aipo.model.loading import load_model
from aipo.passes import Passes
from aipo.policy import Policy
from aipo.problems.datasets import Problem
from aipo.record.reporting import reduce_metrics
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts
from aipo.tokens.attention import AttentionEntropy, attention_weights
from aipo.tokens.early_exit import postfix_ids
from aipo.tokens.table import MEASURES, RULES, batch_mean_std, mask_ranking, measure, needed, token_advantages
from tests.tiny import make_tiny

PROMPTS = [[5, 6, 7], [8, 9]]
COMPLETIONS = [[10, 11, 12, 13], [14, 15], [16], [17, 18, 19]]
LENGTHS = torch.tensor([4, 2, 1, 3])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rollouts() -> Rollouts:
    return Rollouts(
        problems=[Problem("a", "?", "1"), Problem("b", "?", "2")],
        prompts=PROMPTS,
        completions=[Completion(ids, [-0.5 * (i + 1) for i in range(len(ids))], "stop") for ids in COMPLETIONS],
        group_size=2,
        ids=torch.arange(4),
        correct=torch.tensor([True, False, True, False]),
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        used=torch.ones(4, dtype=torch.bool),
    )


def config(*overrides: str) -> Config:
    return load_config("tiny.yaml", ["curriculum.enabled=false", *overrides])


def passes(path: Path, policy: Policy, settings: Config) -> Passes:
    sharded: Any = SimpleNamespace(forward=policy, policy=policy)
    prompter: Any = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(path))
    return Passes(settings, sharded, prompter, torch.device("cpu"))


def measured(name: str, here: Passes, rollouts: Rollouts) -> torch.Tensor:
    return measure({name}, here, batches(), rollouts)[0][name]


def policy_of(path: Path) -> Policy:
    model = load_model(str(path), dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    return Policy(model, temperature=1.0)


def batches(rows: Sequence[int] = range(4)) -> list[Any]:
    made = micro_batches([PROMPTS[i // 2] for i in rows], [COMPLETIONS[i] for i in rows], budget=12, packing=False)
    for micro in made:
        micro.rows = torch.tensor(rows)[micro.rows]
    return [*made, filler()]


def plain_logits(path: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()  # (T, V)


def entropy(logits: torch.Tensor) -> float:
    p = logits.softmax(-1)
    return -float((p * p.log()).sum())


def test_entropy_and_certainty(path: Path, rollouts: Rollouts) -> None:
    here = passes(path, policy_of(path), config())
    found = {name: measured(name, here, rollouts) for name in ("entropy", "certainty")}
    for row, ids in enumerate(COMPLETIONS):
        prompt = PROMPTS[row // 2]
        logits = plain_logits(path, prompt + ids)
        for t in range(len(ids)):
            before = logits[len(prompt) - 1 + t]  # the position that predicts token t
            p = before.softmax(-1)
            certainty = float((-(p * len(p)).log()).mean())
            assert found["entropy"][row, t] == pytest.approx(entropy(before), abs=1e-4)
            assert found["certainty"][row, t] == pytest.approx(certainty, abs=1e-4)
        assert found["entropy"][row, len(ids) :].isnan().all()


def test_surprisal(path: Path, rollouts: Rollouts) -> None:
    """-log p as the engine drew the token."""
    found = measured("surprisal", passes(path, policy_of(path), config()), rollouts)
    for row, ids in enumerate(COMPLETIONS):
        assert found[row, : len(ids)].tolist() == [0.5 * (t + 1) for t in range(len(ids))]
        assert found[row, len(ids) :].isnan().all()


def test_information(path: Path, rollouts: Rollouts) -> None:
    """s_t = H(y | q, o_<t) - H(y | q, o_<=t), the answer's first token behind the postfix."""
    policy = policy_of(path)
    here = passes(path, policy, config("advantage.tokens=information", "advantage.stride=1"))
    postfix = postfix_ids(here.prompter.tokenizer, thinking=False)
    signals, sums = measure({"information"}, here, batches([0, 2, 3]), rollouts)  # the second takes no part
    found = signals["information"]
    assert sums["exit_tokens"] > sum(map(len, COMPLETIONS))
    assert found[1].isnan().all()
    for row, ids in enumerate(COMPLETIONS):
        assert found[row, len(ids) :].isnan().all()
        for t in range(len(ids) if row != 1 else 0):
            after = [
                entropy(plain_logits(path, [*PROMPTS[row // 2], *ids[: t + more], *postfix])[-1]) for more in (0, 1)
            ]
            assert found[row, t] == pytest.approx(after[0] - after[1], abs=2e-4)


def test_information_as_published(path: Path, rollouts: Rollouts) -> None:
    """(H_t + H_{t-1}) / 2 - H_{t+1}: of the early answers, or of the policy's own entropies (the script's default)."""
    here = passes(path, policy_of(path), config("advantage.tokens=information", "advantage.information=smoothed"))
    postfix = postfix_ids(here.prompter.tokenizer, thinking=False)
    answers = measured("information", here, rollouts)
    here.config = config("advantage.tokens=information", "advantage.information=next_token")
    tokens = measured("information", here, rollouts)
    for row, ids in enumerate(COMPLETIONS):
        prompt = PROMPTS[row // 2]
        logits = plain_logits(path, prompt + ids)
        own = [entropy(logits[len(prompt) - 1 + t]) for t in range(len(ids))] + [0.0]
        after = [entropy(plain_logits(path, [*prompt, *ids[:t], *postfix])[-1]) for t in range(len(ids) + 1)]
        for found, h in ((answers, after), (tokens, own)):
            for t in range(len(ids)):
                earlier = h[t - 1] if t else 0.0
                assert found[row, t] == pytest.approx((h[t] + earlier) / 2 - h[t + 1], abs=2e-4)
            assert found[row, len(ids) :].isnan().all()


def test_the_policys_entropy_is_measured_once(path: Path, rollouts: Rollouts) -> None:
    """Where both information and confidence are made of it: one forward pass a micro-batch, and the same values."""
    here = passes(path, policy_of(path), config("advantage.tokens=information", "advantage.information=next_token"))
    every, read = batches(), []
    forward = here.sharded.forward
    here.sharded.forward = lambda *a, **k: read.append(a) or forward(*a, **k)  # type: ignore[func-returns-value, method-assign]
    both, _ = measure({"information", "entropy"}, here, every, rollouts)
    assert len(read) == len(every)
    for name in ("information", "entropy"):
        alone, _ = measure({name}, here, every, rollouts)
        torch.testing.assert_close(both[name], alone[name], equal_nan=True, rtol=0, atol=0)


def test_residual_and_attention(path: Path, rollouts: Rollouts) -> None:
    policy = policy_of(path)
    add_adapters(policy.model, rank=2, alpha=4.0, targets=("all-linear",), seed=0)
    here = passes(path, policy, config("lora.rank=2", "advantage.tokens=residual", "advantage.layers=[0]"))
    before = measured("residual", here, rollouts)
    assert before[0].tolist() == [0.0] * 4  # B is 0 at the start
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    after = measured("residual", here, rollouts)
    assert (after[0] > 0).all()
    assert after[2, 1:].isnan().all()
    attention = measured("attention", here, rollouts)
    assert attention[torch.arange(4) >= LENGTHS[:, None]].isnan().all()
    for row, ids in enumerate(COMPLETIONS):  # test_attention.py has the entropies themselves
        (micro,) = micro_batches([PROMPTS[row // 2]], [ids], budget=1, packing=False)
        with torch.no_grad(), AttentionEntropy(policy, micro.predictors, layers=(0,)) as alone:
            policy(micro)
        torch.testing.assert_close(attention[row, : len(ids)], alone.entropy, atol=1e-5, rtol=0)


def test_unevenness_is_of_what_was_measured(path: Path, rollouts: Rollouts) -> None:
    """Two rollouts stand in no micro-batch, as those of constant groups that are dropped."""
    policy = policy_of(path)
    add_adapters(policy.model, rank=2, alpha=4.0, targets=("all-linear",), seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    here = passes(path, policy, config("lora.rank=2", "advantage.tokens=residual"))
    every = [*micro_batches(PROMPTS, COMPLETIONS[:2], budget=12, packing=False), filler()]
    signals, sums = measure({"residual"}, here, every, rollouts)
    weights = signals["residual"][:2, :4].nan_to_num(0.0)
    assert signals["residual"][2:].isnan().all()
    assert sums["residual_rollouts"] == 2
    assert sums["gini"] == pytest.approx(float(gini(weights, LENGTHS[:2]).sum()))
    assert sums["effective_tokens"] == pytest.approx(float(effective_token_ratio(weights, LENGTHS[:2]).sum()))
    rollouts.rewards = torch.zeros(4)
    logged = reduce_metrics(rollouts, sums, {"forward": 1.0})
    assert logged["advantage/gini"] == pytest.approx(sums["gini"] / 2)
    assert logged["advantage/effective_tokens"] == pytest.approx(sums["effective_tokens"] / 2)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], set()),
        (["mask.rule=all"], set()),
        (["mask.rule=top_fraction", "mask.score=entropy"], {"entropy"}),
        (["mask.rule=all", "mask.score=entropy"], set()),
        (["mask.score=certainty"], {"certainty"}),
        (["mask.rule=quadrant", "mask.score=entropy"], {"entropy"}),
        (["loss.kl_beta=0.1", "loss.kl_priority=2"], set()),  # the reference says how sure it is
        (["advantage.tokens=entropy"], {"entropy"}),
        (["advantage.tokens=attention"], {"attention"}),
        (["advantage.tokens=baseline"], {"energy"}),
        (["advantage.tokens=information"], {"information"}),
        (["advantage.tokens=information", "advantage.signed=entropy"], {"information", "entropy"}),
    ],
)
def test_what_a_config_needs(overrides: list[str], names: set[str]) -> None:
    assert needed(config(*overrides)) == names


def test_mean_and_deviation_skip_what_was_not_measured() -> None:
    nan = float("nan")
    assert batch_mean_std(torch.tensor([[1.0, nan], [2.0, 3.0]])) == pytest.approx((2.0, math.sqrt(2 / 3)))
    assert batch_mean_std(torch.full((2, 2), nan)) == (0.0, 0.0)


def test_shapes_are_the_formulas_over_the_batch(rollouts: Rollouts) -> None:
    values = torch.tensor([[1.0, 2, 3, 4], [2, 2, 0, 0], [5, 0, 0, 0], [1, 1, 2, 0]])
    values[torch.arange(4) >= LENGTHS[:, None]] = float("nan")
    mean, std = batch_mean_std(values)
    settings = config("advantage.tokens=entropy", "mask.rule=all", "advantage.alpha=0.3", "advantage.phi=1.2")
    ranking, shaped = (each(rollouts, {"entropy": values}, settings) for each in (mask_ranking, token_advantages))
    assert ranking is None
    expected = reallocate_by_entropy(rollouts.advantages, values, LENGTHS, mean=mean, std=std, alpha=0.3, phi=1.2)
    assert shaped is not None
    assert torch.equal(shaped, expected)
    settings = config("mask.rule=quadrant", "mask.score=entropy")
    ranking, shaped = (each(rollouts, {"entropy": values}, settings) for each in (mask_ranking, token_advantages))
    assert shaped is None
    assert ranking is not None
    quadrants = entropy_quadrants(rollouts.advantages, values, LENGTHS, threshold=mean)
    assert ranking.tolist() == quadrants.float().tolist()
    settings = config("advantage.tokens=residual", "lora.rank=2")
    shaped = token_advantages(rollouts, {"residual": values}, settings)
    assert shaped is not None
    assert torch.equal(shaped, weight_tokens(rollouts.advantages, values.nan_to_num(0.0), LENGTHS))
    assert shaped[0].mean() == pytest.approx(1.0)
    settings = config("advantage.tokens=attention", "advantage.strength=2", "advantage.favour=explorers")
    shaped = token_advantages(rollouts, {"attention": values}, settings)
    weights = attention_weights(values, LENGTHS, strength=2.0, favour="explorers")
    assert shaped is not None
    assert torch.equal(shaped, weight_tokens(rollouts.advantages, weights, LENGTHS))
    rollouts.rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])
    for keys, tail in (([], None), (["advantage.tail=reward", "advantage.normalize=none"], rollouts.rewards)):
        shaped = token_advantages(rollouts, {"energy": values}, config("advantage.tokens=baseline", *keys))
        assert shaped is not None
        wanted = subtract_token_baseline(rollouts.advantages, values, LENGTHS, rollouts.group_size, tail=tail)
        assert torch.equal(shaped, wanted)
    assert mask_ranking(rollouts, {}, config()) is None is token_advantages(rollouts, {}, config())
    # what is measured for another stage does not take the place of mutual information
    assert mask_ranking(rollouts, {"entropy": values}, config("reward.rule=certainty")) is None
    assert mask_ranking(rollouts, {"certainty": values}, config("mask.score=certainty")) is values
    rollouts.correct = torch.tensor([True, False, True, False])
    arguments = rollouts.advantages, values, rollouts.logp_engine.exp(), rollouts.correct, LENGTHS
    for keys, alpha, beta in (
        ([], 0.01, 0.01),  # not the 0.2 of advantage.alpha
        (["advantage.information_weight=0.3", "advantage.beta=0.05"], 0.3, 0.05),
    ):
        shaped = token_advantages(rollouts, {"information": values}, config("advantage.tokens=information", *keys))
        assert shaped is not None
        assert torch.equal(shaped, information_advantages(*arguments, alpha=alpha, beta=beta))
    published = ["advantage.tokens=information", "advantage.signed=entropy", "advantage.token_norm=l2"]
    other = values.square()  # of the entropy, which is another measure
    shaped = token_advantages(rollouts, {"information": values, "entropy": other}, config(*published))
    arguments = rollouts.advantages, values, -other, rollouts.correct, LENGTHS
    assert shaped is not None
    assert torch.equal(shaped, information_advantages(*arguments, norm="l2"))


def test_every_rule_and_every_measure_is_an_entry_of_its_table() -> None:
    """What a YAML can name stands in the tables, and what a rule reads is measured."""
    fields = AdvantageConfig.model_fields["tokens"]
    assert {"none", *RULES} == set(get_args(fields.annotation))
    for section in (AdvantageConfig(), AdvantageConfig(signed="entropy")):
        assert set().union(*(rule.reads(section) for rule in RULES.values())) <= set(MEASURES)
    assert set(MEASURES) == set(get_args(Measured))


def test_known_tokens_are_marked(path: Path, rollouts: Rollouts) -> None:
    rollouts.problems = [Problem("a", "?", "1", critical=(1, 3)), Problem("b", "?", "2", critical=(0,))]
    policy = Policy(
        load_model(str(path), dtype=torch.float32, attention="sdpa", gradient_checkpointing=False), temperature=1
    )
    batches = micro_batches(
        rollouts.each_prompt[:3], COMPLETIONS[:3], budget=64, packing=False
    )  # the last takes no part
    found, _ = measure({"critical", "filler"}, passes(path, policy, config()), batches, rollouts)
    nan = float("nan")
    wanted = torch.tensor([[0, 1, 0, 1], [0, 1, nan, nan], [1, nan, nan, nan], [nan] * 4])  # (B, T)
    assert torch.equal(found["critical"].nan_to_num(-1), wanted.nan_to_num(-1))
    assert torch.equal(found["filler"].nan_to_num(-1), (1 - wanted).nan_to_num(-1))
