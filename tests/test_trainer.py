"""One update of the trainer against the objective written out on whole sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from aipo.config import Config, load_config
from aipo.curriculum import Curriculum
from aipo.errors import TrainingError
from aipo.layout import MicroBatch, pad
from aipo.mask import MaskRule, prefix_lengths
from aipo.metrics import Accuracy
from aipo.mi import coordinate_scores
from aipo.passes import Passes
from aipo.policy import make_policy
from aipo.problems.datasets import Problem
from aipo.problems.prompts import Prompter, wrong_golds
from aipo.record.clock import Clock
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts
from aipo.selection import Selection, TokenSelector
from aipo.sharding import frozen_reference, shard
from aipo.trainer import Trainer
from tests.reference import blend, icepop_weights, objective
from tests.tiny import make_tiny

LENGTHS = [9, 14, 1, 6, 11, 3, 8, 12]  # of 4 questions x 2 rollouts
MAX_TOKENS = 16
SEED = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), scale=0.1)


def config_of(model: Path, *overrides: str) -> Config:
    usual = [f"model.path={model}", "model.dtype=float32", "sharding.zero_stage=0", "rollout.samples_per_question=2"]
    usual += ["rollout.questions_per_step=4", f"rollout.max_tokens={MAX_TOKENS}", "loss.kl_beta=0"]
    usual += [
        f"seed={SEED}",
        "optim.micro_tokens=60",
        "optim.max_grad_norm=1e9",
        "reward.overlong_buffer=1",
        "curriculum.enabled=false",
    ]
    return load_config("tiny.yaml", [*usual, *overrides])


def made(config: Config, model: Path) -> tuple[Trainer, Rollouts]:
    draw = torch.Generator().manual_seed(1)
    prompter = Prompter(
        AutoTokenizer.from_pretrained(model),
        system=None,
        examples=[],
        suffix=None,
        thinking=False,
        max_prompt_tokens=192,
    )
    problems = [Problem(str(q), f"{q} + {q} =", str(2 * q)) for q in range(4)]
    completions = [
        Completion(torch.randint(10, 300, (n,), generator=draw).tolist(), [-1.0] * n, "length") for n in LENGTHS
    ]
    rollouts = Rollouts(
        problems=problems,
        prompts=[prompter.encode(problem.question) for problem in problems],
        completions=completions,
        group_size=2,
        ids=torch.tensor([40, 7, 3, 22, 5, 61, 18, 2]),  # after balancing over ranks they are in no order
        texts=[""] * 8,
        advantages=torch.randn(8, generator=draw),
        used=torch.tensor([True] * 5 + [False] + [True] * 2),
    )
    device = torch.device("cpu")
    trainer = Trainer(
        config,
        problems=[],
        held_out=[],
        collector=SimpleNamespace(prompter=prompter),  # type: ignore[arg-type]
        passes=Passes(config, shard(make_policy(config, str(model)), config, device), prompter, device),
        reference=None,
        selector=TokenSelector(config),
        curriculum=None,  # type: ignore[arg-type]
        store=None,  # type: ignore[arg-type]
        tracker=None,  # type: ignore[arg-type]
        progress=None,  # type: ignore[arg-type]
        identity={},
        engine_gap=lambda: 0.0,
    )
    return trainer, rollouts


def test_the_initial_validation_is_the_first_best(model: Path) -> None:
    """A run that never does better than before it stalls after P_val validations, not one later."""
    config = config_of(model, "curriculum.stall_patience=2")
    trainer, _ = made(config, model)
    logged: list[tuple[int, dict[str, float]]] = []
    trainer.tracker = SimpleNamespace(log=lambda *entry: logged.append(entry))  # type: ignore[assignment]
    trainer.validate = lambda: {"validation/accuracy": 0.5}  # type: ignore[method-assign]
    trainer.curriculum = Curriculum(["a"], config.curriculum, config.mask, total_steps=config.optim.steps, seed=0)
    trainer.step = config.optim.steps
    assert trainer.train()
    assert logged == [(0, {"validation/accuracy": 0.5})]
    assert not trainer.curriculum.observe_validation(0.5)
    assert not trainer.curriculum.observe_validation(0.4)
    assert trainer.curriculum.stalls == 1


def stepping(config: Config, model: Path) -> tuple[Trainer, list[dict[str, float]], list[dict[str, Any]]]:
    """A trainer that gets one batch over and over and draws each step's questions one step ahead; what it logs, and
    the states that it saves."""
    trainer, rollouts = made(config, model)
    rollouts.rewards = torch.tensor([1.0, 0] * 4)
    rollouts.correct = rollouts.rewards == 1
    trainer.before = Accuracy(0.5, 0.4, 0.6, problems=4, samples=8)
    trainer.curriculum = Curriculum(list("abc"), config.curriculum, config.mask, total_steps=10, seed=0)
    logged: list[dict[str, float]] = []
    states: list[dict[str, Any]] = []

    def drawn(step: int, *_: object, **__: object) -> tuple[Rollouts, dict[str, float]]:
        for each in range(step + (step > 0), step + 2):
            trainer.curriculum.sample(each, 2)
        return rollouts, {}

    trainer.validate = lambda: {"validation/accuracy": 0.5}  # type: ignore[method-assign]
    trainer.generation.rollouts = drawn  # type: ignore[method-assign]
    trainer.collector.engine = SimpleNamespace(sync=list)
    trainer.tracker = SimpleNamespace(log=lambda _, line: logged.append(line), log_rollouts=print, state_dict=dict)  # type: ignore[assignment]
    trainer.progress = SimpleNamespace(update=lambda *_: None, say=lambda _: None)  # type: ignore[assignment]
    trainer.save = lambda: states.append(trainer.state_dict()) or Path("saved")  # type: ignore[func-returns-value, method-assign]
    return trainer, logged, states


def test_a_gap_ends_a_job_that_is_stopped_after_every_step(model: Path) -> None:
    """The engine said -1 of every token: each step is beyond the guard, and the second in a row ends the run."""
    config = config_of(model, "guards.max_bad_steps=2", "tracking.replay=false", "tracking.rollouts_per_step=0")
    first, logged, states = stepping(config, model)
    first.stop_requested = lambda: True
    assert not first.train()
    assert logged[0]["mismatch/gap"] > config.guards.max_gap
    assert len(states) == 1
    second, logged, _ = stepping(config, model)
    second.tracker.load_state_dict = lambda state: None  # type: ignore[method-assign]
    second.stop_requested = lambda: True
    second.load_state_dict(states[0])
    with pytest.raises(TrainingError, match="in 2 steps in a row"):
        second.train()
    assert second.step == 2


QUIET = ["tracking.replay=false", "tracking.rollouts_per_step=0", "guards.max_gap=99"]


def test_a_line_has_the_curriculum_and_the_rate_of_its_own_step(model: Path) -> None:
    keys = ["optim.steps=3", "validation.every=99", "optim.lr=1e-3", "optim.warmup_steps=2"]
    trainer, logged, _ = stepping(config_of(model, *keys, *QUIET), model)
    rates: list[float] = []
    optimizer = trainer.sharded.optimizer  # type: ignore[attr-defined]
    trainer.progress.update = lambda *_: rates.append(optimizer.param_groups[0]["lr"])  # type: ignore[method-assign]
    assert trainer.train()
    assert rates == [line["policy/lr"] for line in logged] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert [line["curriculum/clock"] for line in logged] == [0, 1, 2]
    assert [line["curriculum/epoch_easy"] for line in logged] == [0, 1, 1]  # 2 of 3 questions a step


def test_a_new_best_is_saved(model: Path) -> None:
    keys = ["optim.steps=3", "validation.every=1", "checkpoint.every=99"]
    trainer, _, states = stepping(config_of(model, *keys, *QUIET), model)
    trainer.curriculum.observe_validation(0.5)
    found = iter([0.5, 0.6, 0.6])
    trainer.validate = lambda: {"validation/accuracy": next(found)}  # type: ignore[method-assign]
    assert trainer.train()
    assert [state["step"] for state in states] == [2, 3]  # the last is saved anyway


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(model: Path, tmp_path: Path) -> None:
    """By thresholds that run over the steps, to an end by the tokens generated: 64 a step."""
    keys = ["mask.scope=running", "optim.steps=9", "optim.generated_tokens=150", "validation.every=99"]
    config = config_of(model, *keys, *QUIET)
    whole, expected, _ = stepping(config, model)
    assert whole.train()
    assert whole.step == 3
    first, logged, states = stepping(config, model)
    first.stop_requested = lambda: True
    assert not first.train()
    first.sharded.save(tmp_path)
    second, later, _ = stepping(config, model)
    second.tracker.load_state_dict = lambda state: None  # type: ignore[method-assign]
    second.load_state_dict(states[0])
    second.sharded.load(tmp_path)
    assert second.train()
    assert second.selector.rule.running is not None
    assert torch.equal(second.selector.rule.running, whole.selector.rule.running)  # type: ignore[arg-type]
    for line, other in zip(expected, logged + later, strict=True):
        for key, value in line.items():
            if not key.startswith(("time/", "speed/")):
                assert other[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key


def test_gold_states_of_the_initial_weights_and_of_other_questions(model: Path) -> None:
    trainer, rollouts = made(config_of(model), model)
    questions, prompter, sharded = rollouts.problems, trainer.passes.prompter, trainer.sharded
    usual = trainer.passes.gold_states(questions)  # (Q, d)
    kept = Passes(config_of(model, "mi.gold_refresh=never"), sharded, prompter, torch.device("cpu"), questions)
    kept.keep_golds(questions)
    shuffled = config_of(model, "mi.gold_control=shuffled")
    wrong = Passes(shuffled, sharded, prompter, torch.device("cpu"), questions).gold_states(questions)
    for row, question in zip(wrong, questions):
        (source,) = (i for i, state in enumerate(usual) if torch.allclose(state, row, atol=1e-5))
        assert questions[source] == wrong_golds(questions, shuffled.seed)[question.id] != question
    with torch.no_grad():
        for _, parameter in sharded.names():
            parameter += 0.1
    assert not torch.allclose(trainer.passes.gold_states(questions), usual, atol=1e-3)
    assert torch.allclose(kept.gold_states(questions), usual, atol=1e-5)
    assert torch.equal(kept.gold_states(questions[2:3])[0], kept.gold_states(questions)[2])
    assert kept.gold_states([]).shape == (0, usual.shape[1])


ANSWERS = ["4", "12 + 7 is 19", r"\frac{1}{2}", "19"]


@pytest.mark.parametrize(
    ("pool", "layer", "gold_text", "read_as"),
    [
        ("last", 0, "answer", "{0.answer}"),
        ("mean", -1, "boxed", r"\boxed{{{0.answer}}}"),
        ("last", -1, "question_answer", "{0.question}\n{0.answer}"),
        ("last", 0, "solution", "so {0.answer}"),
    ],
)
def test_gold_states_are_those_of_a_plain_forward(
    model: Path, pool: str, layer: int, gold_text: str, read_as: str
) -> None:
    """Against what Hugging Face's own module behind the layer reads: the raw residual stream, the last token's too."""
    keys = f"mi.gold_pool={pool}", f"mi.layer={layer}", f"mi.gold_text={gold_text}"
    trainer, rollouts = made(config_of(model, *keys), model)
    questions = [
        Problem(p.id, p.question, answer, solution=f"so {answer}") for p, answer in zip(rollouts.problems, ANSWERS)
    ]
    found = trainer.passes.gold_states(questions)  # (Q, d)
    plain = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    behind = plain.model.layers[1] if layer == 0 else plain.model.norm
    read: list[torch.Tensor] = []
    behind.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0].detach()))
    for question in questions:
        text = read_as.format(question)
        plain(torch.tensor([trainer.passes.prompter.tokenizer.encode(text, add_special_tokens=False)]))
    assert len({len(states) for states in read}) > 2
    expected = torch.stack([states[-1] if pool == "last" else states.mean(0) for states in read])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def whole_sequences(
    config: Config, model: Path, rollouts: Rollouts, mask: torch.Tensor, inclusion: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of the loss, in loops, on all tokens of all used rollouts, one forward pass each, all logits."""
    reference, rollout = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32), config.rollout
    rows = torch.nonzero(rollouts.used)[:, 0].tolist()
    logps, entropies, weights = [], [], []
    for row in rows:
        prompt, drawn = rollouts.prompts[row // 2], rollouts.completions[row]
        logits = reference(torch.tensor([[*prompt, *drawn.token_ids]])).logits[0, len(prompt) - 1 : -1]  # (T, V)
        log_p = (logits / rollout.temperature).log_softmax(-1)  # (T, V)
        logps.append(log_p.gather(1, torch.tensor(drawn.token_ids)[:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        bounds = rollout.importance_floor, rollout.importance_cap
        weights.append(torch.tensor(icepop_weights(logps[-1].tolist(), drawn.logprobs, *bounds)))
    lengths = rollouts.lengths[rows]
    logp = pad(torch.cat(logps), lengths)  # (b, T)
    assert rollout.importance_correction in ("none", "token_mask")
    objective(
        logp,
        logp.detach(),
        rollouts.advantages[rows],
        mask[rows][:, : logp.shape[1]],
        aggregation=config.loss.aggregation,
        max_length=MAX_TOKENS,
        lengths=lengths,
        inclusion=None if inclusion is None else inclusion[rows][:, : logp.shape[1]],
        entropy=pad(torch.cat(entropies), lengths),
        entropy_weight=config.loss.entropy_weight,
        importance_weight=pad(torch.cat(weights), lengths) if rollout.importance_correction == "token_mask" else None,
    ).backward()
    return {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}


def assert_gradient(trainer: Trainer, expected: dict[str, torch.Tensor]) -> None:
    """Of the first update: AdamW's first moment has it."""
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, parameter in trainer.sharded.names():
        moment = trainer.sharded.optimizer.state[parameter]["exp_avg"]  # type: ignore[attr-defined]
        found = moment / (1 - trainer.config.optim.betas[0])
        assert float((found - expected[name]).abs().max()) < 2e-5 * largest, name


RULES = {
    "prefix": ["mask.rule=prefix", "mask.prefix_start=0.3"],
    "prefix, shared prompts": ["mask.rule=prefix", "mask.prefix_start=0.3", "optim.share_prompts=true"],
    "random": ["mask.rule=random", "mask.fraction=0.1"],
    "random prefix": ["mask.rule=random_prefix", "mask.reweight=true"],
    "bernoulli, shared prompts": ["mask.rule=bernoulli", "mask.reweight=true", "optim.share_prompts=true"],
    "probe": ["mask.scope=batch", "mask.kappa_start=2.0"],
    "entropy": ["mask.rule=top_fraction", "mask.score=entropy", "mask.scope=batch", "mask.fraction=0.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant", "all_tokens"])
@pytest.mark.parametrize("rule", RULES)
def test_what_lies_behind_the_last_selected_token_changes_nothing(model: Path, rule: str, aggregation: str) -> None:
    overrides = [f"loss.aggregation={aggregation}", "rollout.importance_correction=none"]
    overrides += ["rollout.temperature=0.7", "mi.layer=0"]
    config = config_of(model, *RULES[rule], *overrides)
    trainer, rollouts = made(config, model)
    read = []
    forward = trainer.sharded.forward
    trainer.sharded.forward = lambda micro, *a, **k: read.append((len(a), micro.lengths)) or forward(micro, *a, **k)  # type: ignore[func-returns-value, method-assign]
    before = {name: p.detach().clone() for name, p in trainer.sharded.names()}
    rollouts.prefix = 0.3
    selection, _ = trainer.update(rollouts, 2.0, Clock())

    trained = torch.cat([lengths for selecting, lengths in read if selecting])
    assert len(trained) == 7  # every used rollout, even if nothing of it is read
    assert int(trained.sum()) < sum(LENGTHS) - LENGTHS[5]  # or nothing was left out
    if rule == "probe":
        assert 0 in trained.tolist()
    chances = (
        trainer.selector.rule.inclusion(rollouts.lengths, selection.mask.shape[1]) if config.mask.reweight else None
    )
    assert_gradient(trainer, whole_sequences(config, model, rollouts, selection.mask, chances))
    for name, parameter in trainer.sharded.names():
        assert not torch.equal(parameter, before[name])


TERMS = {
    "entropy": ["loss.entropy_weight=0.5", "rollout.importance_correction=none"],
    "token_mask": ["rollout.importance_correction=token_mask"],
}


@pytest.mark.parametrize("terms", TERMS)
def test_the_gradient_of_a_reward_of_entropy_and_of_weighted_tokens(model: Path, terms: str) -> None:
    keys = ["mask.rule=top_fraction", "mask.fraction=0.5", "rollout.temperature=0.7"]
    keys += ["rollout.importance_cap=1.5", "rollout.importance_floor=0.8"]
    config = config_of(model, *keys, *TERMS[terms])
    trainer, rollouts = made(config, model)
    logp = trainer.passes.log_probs(rollouts.each_prompt, rollouts.each_completion)  # (B, T)
    apart = [0.2, -0.4, 0.3, -0.1, 0.6]  # nats to what the engine says: ratios 1.22, 0.67, 1.35, 0.90 and 1.82
    for row, drawn in enumerate(rollouts.completions):
        said = [float(logp[row, t]) - apart[t % 5] for t in range(LENGTHS[row])]
        rollouts.completions[row] = replace(drawn, logprobs=said)
    selection, sums = trainer.update(rollouts, 0.3, Clock())
    if terms == "token_mask":
        rows, places = selection.mask.nonzero(as_tuple=True)
        assert sums["mismatch_dropped"] == sum(t % 5 in (1, 4) for t in places.tolist())
        assert 0 < sums["mismatch_dropped"] < len(rows)
    assert_gradient(trainer, whole_sequences(config, model, rollouts, selection.mask))


def test_an_update_without_a_selected_token_moves_nothing(model: Path) -> None:
    """AdamW would go on by its momentum: with this aggregation the sum over no token has a denominator."""
    trainer, rollouts = made(config_of(model, "loss.aggregation=constant"), model)
    trainer.update(rollouts, 0.3, Clock())
    before = {name: p.detach().clone() for name, p in trainer.sharded.names()}
    selection, sums = trainer.update(rollouts, 99.0, Clock())
    assert not selection.mask.any()
    assert sums["denominator"] == 7 * MAX_TOKENS
    for name, parameter in trainer.sharded.names():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("mi_blend", ["none", "additive"])
def test_a_prefix_is_that_which_the_batch_was_drawn_with(model: Path, mi_blend: str) -> None:
    config = config_of(model, "mask.rule=prefix", f"advantage.mi_blend={mi_blend}")
    trainer, rollouts = made(config, model)
    rollouts.prefix = 0.4
    selection, _ = trainer.update(rollouts, 0.3, Clock())
    expected = torch.where(rollouts.used, prefix_lengths(rollouts.lengths, 0.4), 0)  # (B,)
    assert torch.equal(selection.mask.sum(1), expected)
    assert torch.equal(selection.ends, expected)


@pytest.mark.parametrize("mi_blend", ["none", "additive"])
def test_a_drawn_mask_is_that_of_its_rollouts(model: Path, mi_blend: str) -> None:
    """By the run's seed, the step and a rollout's own number, whether it is decided before or in the forward pass."""
    config = config_of(model, "mask.rule=random", "mask.fraction=0.4", f"advantage.mi_blend={mi_blend}")
    trainer, rollouts = made(config, model)
    trainer.step = 3
    selection, _ = trainer.update(rollouts, 0.3, Clock())
    assert selection.decided == (mi_blend == "none")
    drawn = MaskRule(config.mask, seed=SEED).select(
        torch.zeros(8, max(LENGTHS)), torch.tensor(LENGTHS), kappa=0.3, step=3, rollout_ids=rollouts.ids
    )
    assert torch.equal(selection.mask, drawn & rollouts.used[:, None])


ONCE = {
    "all": [],
    "probe": ["mask.rule=top_fraction", "mask.score=entropy", "mask.scope=batch", "mask.fraction=0.5"],
    "shared prompts": ["optim.share_prompts=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["sequence", "token", "all_tokens"])
@pytest.mark.parametrize("rule", ONCE)
def test_what_branches_share_is_trained_once(model: Path, rule: str, aggregation: str) -> None:
    """Against whole sequences under Hugging Face's own forward: a token counts in the first rollout that has it, with
    that rollout's advantage, and in the loss's denominator."""
    overrides = ["mask.rule=all", f"loss.aggregation={aggregation}", "rollout.importance_correction=none"]
    config = config_of(model, *overrides, *ONCE[rule])
    trainer, rollouts = made(config, model)
    shared = [0, 2, 0, 1, 0, 0, 0, 3]  # tokens that the second of a pair has from the first; one first is not used
    rollouts.used = torch.tensor([True, True, True, True, False, True, True, True])
    for row, count in enumerate(shared):
        first = rollouts.completions[row - row % 2]
        count = min(count, len(first.token_ids), len(rollouts.completions[row].token_ids) - 1)
        rollouts.completions[row].token_ids[:count] = first.token_ids[:count]
        parent = ((row - row % 2, count),) if count else ()
        rollouts.lineage.append((*parent, (row, len(rollouts.completions[row].token_ids))))
    rollouts.completions[5].token_ids[:1] = rollouts.completions[4].token_ids[:1]
    rollouts.lineage[5] = ((4, 1), *rollouts.lineage[5])
    selection, sums = trainer.update(rollouts, 2.0, Clock())
    twice = rollouts.repeated()
    assert 0 < int(twice.sum()) <= sum(shared)
    assert not twice[5].any()  # what it shares with a rollout outside the update, it alone trains on
    assert not (selection.mask & twice).any()
    if rule != "probe":
        grid = torch.arange(selection.mask.shape[1]) < rollouts.lengths[:, None]
        assert torch.equal(selection.mask[rollouts.used], (grid & ~twice)[rollouts.used])
    reference = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, denominator = torch.zeros(()), 0
    for row in torch.nonzero(rollouts.used)[:, 0].tolist():
        prompt, completion = rollouts.prompts[row // 2], rollouts.completions[row].token_ids
        logits = reference(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]  # (T, V)
        logp = (logits / config.rollout.temperature).log_softmax(-1)
        chosen = [t for t in range(len(completion)) if selection.mask[row, t]]
        of_row = sum((-rollouts.advantages[row] * logp[t, completion[t]] for t in chosen), torch.zeros(()))
        if aggregation == "sequence":
            total, denominator = total + of_row / max(len(chosen), 1), denominator + bool(chosen)
        else:
            total = total + of_row
            own = sum(not twice[row, t] for t in range(len(completion)))
            denominator += own if aggregation == "all_tokens" else len(chosen)
    assert sums["denominator"] == denominator
    (total / denominator).backward()
    assert_gradient(trainer, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None})


def test_a_mask_that_needs_the_states_is_decided_in_the_forward_that_is_trained(model: Path) -> None:
    trainer, rollouts = made(config_of(model), model)
    selection, _ = trainer.update(rollouts, 0.3, Clock())
    assert not selection.decided


@pytest.mark.parametrize("scope", ["sequence", "causal"])
def test_the_wrong_gold_twin_by_loops(model: Path, scope: str) -> None:
    """IoU with the mask that the next question's gold makes, and nothing else is touched by looking at it."""
    config = config_of(model, f"mask.scope={scope}")
    trainer, rollouts = made(config, model)
    rollouts.problems[2] = Problem("2", "1 + 1 =", rollouts.problems[1].answer)  # the next of another answer is 3
    gold = trainer.passes.gold_states(rollouts.problems)  # (Q, d)
    both = either = 0
    for question, other in ((0, 1), (1, 3), (2, 3), (3, 0)):
        row = 2 * question
        if not rollouts.used[row]:
            continue
        (micro,) = trainer.passes.batches([rollouts.prompts[question]], [rollouts.completions[row].token_ids])
        states = trainer.passes.states(micro)  # (T, d)
        masks = []
        for which in (question, other):
            settings = {"num_features": config.mi.num_features, "sigma": config.mi.sigma, "seed": config.seed}
            scores = coordinate_scores(states, gold[which], **settings)  # type: ignore[arg-type]  # (T,)
            masks.append(
                MaskRule(config.mask).select(
                    scores[None], torch.tensor([len(scores)]), kappa=0.3, step=0, rollout_ids=torch.tensor([row])
                )
            )
        both += int((masks[0] & masks[1]).sum())
        either += int((masks[0] | masks[1]).sum())
    selection, sums = trainer.update(rollouts, 0.3, Clock())
    assert (sums["wrong_gold_both"], sums["wrong_gold_either"]) == (both, either)
    assert 0 < both < either
    alone, same = made(config, model)
    same.problems[:] = [Problem(p.id, p.question, rollouts.problems[i].answer) for i, p in enumerate(same.problems)]
    same.problems[2] = rollouts.problems[2]
    alone.selector.compares = False
    without, sums_without = alone.update(same, 0.3, Clock())
    assert torch.equal(without.mask, selection.mask)
    assert sums_without["loss"] == sums["loss"]
    assert sums_without["grad_norm"] == sums["grad_norm"]
    assert sums_without["wrong_gold_either"] == 0


def all_selected(micro: MicroBatch) -> dict[str, torch.Tensor]:
    """What a forward pass gives, without one."""
    mask = torch.ones(int(micro.lengths.sum()), dtype=torch.bool)  # (N,)
    return {"mask": mask, "logp": torch.zeros(len(mask)), "entropy": torch.zeros(len(mask))}


def test_blended_advantages_reach_the_loss(model: Path) -> None:
    trainer, rollouts = made(config_of(model, "advantage.mi_blend=additive", "advantage.mi_weight=0.5"), model)
    selection = Selection(trainer.selector, rollouts, None, kappa=0.3, step=0)
    selection.scores = torch.randn(8, max(LENGTHS), generator=torch.Generator().manual_seed(2))
    for micro in trainer.passes.update_batches(rollouts)[0]:
        advantages = trainer.loss_inputs(micro, all_selected(micro), None, selection, rollouts).advantages  # (b, t)
        for i, row in enumerate(micro.rows.tolist()):
            scores = selection.scores[row, : LENGTHS[row]].tolist()
            expected = blend(float(rollouts.advantages[row]), scores, "additive", 0.5)
            assert advantages[i, : LENGTHS[row]].tolist() == pytest.approx(expected, abs=1e-5)


def test_shaped_advantages_reach_the_loss(model: Path) -> None:
    trainer, rollouts = made(config_of(model), model)
    selection = Selection(trainer.selector, rollouts, None, kappa=0.3, step=0)
    part = trainer.passes.update_batches(rollouts)[0]
    rollouts.token_advantages = torch.arange(8.0 * 14).reshape(8, 14)
    for micro in part:
        out = all_selected(micro)
        inputs = trainer.loss_inputs(micro, out, None, selection, rollouts)
        assert torch.equal(inputs.advantages, rollouts.token_advantages[micro.rows, : int(micro.lengths.max())])
    rollouts.token_advantages = None
    assert torch.equal(
        trainer.loss_inputs(micro, out, None, selection, rollouts).advantages, rollouts.advantages[micro.rows]
    )


@pytest.mark.parametrize("certain", ["entropy", "largest"])
def test_the_kl_is_weighted_by_the_certainty_of_the_initial_model(model: Path, certain: str) -> None:
    """Against Hugging Face's own forward of it, token by token; the policy's entropies are not looked at."""
    config = config_of(model, "loss.kl_beta=0.1", "loss.kl_priority=2", f"loss.kl_certainty={certain}")
    trainer, rollouts = made(config, model)
    trainer.reference = frozen_reference(config, str(model), torch.device("cpu"))
    selection = Selection(trainer.selector, rollouts, None, kappa=0.3, step=0)
    micro = trainer.passes.update_batches(rollouts)[0][0]
    out = {"mask": torch.arange(int(micro.lengths.sum())) % 3 > 0}  # some tokens are not selected
    out["logp"] = out["entropy"] = torch.zeros(int(out["mask"].sum()))
    inputs = trainer.loss_inputs(micro, out, None, selection, rollouts)
    assert inputs.kl_weight is not None
    assert inputs.logp_ref is not None
    whole = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    for i, row in enumerate(micro.rows.tolist()):
        prompt, completion = rollouts.prompts[row // 2], rollouts.completions[row].token_ids
        with torch.no_grad():
            logits = whole(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]  # (T, V)
        for t in inputs.mask[i].nonzero()[:, 0].tolist():
            p = logits[t].double().softmax(-1)
            likely = sum(q * math.log(q) for q in p.tolist()) if certain == "entropy" else math.log(max(p.tolist()))
            certainty = 1 + likely / math.log(len(p))
            assert float(inputs.kl_weight[i, t]) == pytest.approx(certainty**2, abs=1e-5)
            assert float(inputs.logp_ref[i, t]) == pytest.approx(math.log(p[completion[t]]), abs=1e-4)


def test_the_kl_comes_off_the_reward(model: Path) -> None:
    """Against log-probabilities of whole sequences under Hugging Face's own forward; what was cut off is left out."""
    config = config_of(model, "loss.kl_beta=0.1", "loss.kl_in=reward", "loss.truncated=mask")
    trainer, rollouts = made(config, model)
    for row in (0, 1, 3, 4, 5):
        rollouts.completions[row] = replace(rollouts.completions[row], finish_reason="stop")
    rollouts.rewards, rollouts.correct = torch.arange(8.0), torch.zeros(8, dtype=torch.bool)
    rollouts.rewards[5] = torch.nan  # no verdict
    trainer.reference = lambda _micro, mask: (torch.full((int(mask.sum()),), -2.0), torch.zeros(int(mask.sum())))
    found = trainer.set_advantages(rollouts, Clock())
    whole = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in range(8):
        prompt, completion = rollouts.prompts[row // 2], rollouts.completions[row].token_ids
        with torch.no_grad():
            logits = whole(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]  # (T, V)
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
        expected = float("nan") if row == 5 else row - 0.1 * float(logp + 2.0 * len(completion))
        assert float(rollouts.rewards[row]) == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert found["trained_reward"] == pytest.approx(float(rollouts.rewards.nansum()))
    assert rollouts.used.nonzero()[:, 0].tolist() == [0, 1, 3, 4]
    selection = Selection(trainer.selector, rollouts, None, kappa=0.3, step=0)
    micro = trainer.passes.update_batches(rollouts)[0][0]
    inputs = trainer.loss_inputs(micro, all_selected(micro), None, selection, rollouts)
    assert inputs.logp_ref is None  # not in the loss as well
