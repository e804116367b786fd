"""MI-DROP and MI-FORCE against slow loops, alone and inside the Hugging Face engine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from aipo.errors import UserError
from aipo.rollout import Request, Sampling, make_engine
from aipo.rollout.interventions import DEFAULT_WORDS, Intervention, describe, intervene, mined_tokens, variant_ids
from tests.tiny import make_tiny

INF = math.inf
THRESHOLDS = {"nucleus": (0.05, 0.2, 0.5, 0.9), "rank": (1, 2, 4), "probability": (0.02, 0.1, 0.4)}


def likely(p: Sequence[float], token: int, rule: str, threshold: float) -> tuple[bool, float]:
    """Is the token among the likely ones, and how clearly (distance from the edge)?"""
    more = [q for q in p if q > p[token]]
    value, inside = {
        "nucleus": (sum(more), sum(more) < threshold),
        "rank": (len(more) + 0.5, len(more) < threshold),
        "probability": (p[token], p[token] >= threshold),
    }[rule]
    return inside, abs(value - threshold)


def forced_token(p: Sequence[float], intervention: Intervention) -> tuple[int | None, float]:
    """The token that must be emitted, by asking every token of the set; and the margin of the closest decision."""
    answers = {i: likely(p, i, intervention.rule, intervention.threshold) for i in intervention.token_ids}
    inside = [i for i, (yes, _) in answers.items() if yes]
    margin = min(m for _, m in answers.values())
    return (max(inside, key=lambda i: (p[i], -i)) if inside else None), margin


def softmax(row: Sequence[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / math.fsum(weights) for w in weights]


def interventions(vocabulary: int) -> st.SearchStrategy[Intervention]:
    ids = st.sets(st.integers(0, vocabulary - 1), min_size=1, max_size=vocabulary - 1).map(tuple)
    rules = st.sampled_from([(rule, t) for rule, all_ in THRESHOLDS.items() for t in all_])
    drop = st.builds(Intervention, st.just("drop"), ids)
    return drop | st.builds(lambda ids, rule: Intervention("force", ids, *rule), ids, rules)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_intervene_equals_loops(data):
    vocabulary = 8
    # Whole numbers in half steps make many ties.
    row = st.lists(st.integers(-6, 6).map(lambda x: x / 2), min_size=vocabulary, max_size=vocabulary)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    few = data.draw(st.lists(interventions(vocabulary), min_size=1, max_size=2))  # rows share them
    wanted = data.draw(st.lists(st.sampled_from([None, *few]), min_size=len(rows), max_size=len(rows)))
    expected = []
    for logits, intervention in zip(rows, wanted):
        new = list(logits)
        if intervention is not None and intervention.mode == "drop":
            new = [-INF if i in intervention.token_ids else x for i, x in enumerate(logits)]
        elif intervention is not None:
            token, margin = forced_token(softmax(logits), intervention)
            if margin < 1e-5:
                return
            if token is not None:
                new = [0.0 if i == token else -INF for i in range(vocabulary)]
        expected.append(new)
    given_logits = torch.tensor(rows)
    assert intervene(given_logits, wanted).tolist() == expected
    assert given_logits.tolist() == rows  # not changed


@pytest.mark.parametrize(
    ("intervention", "expected"),
    [
        # p = 0.4, 0.3, 0.2, 0.1: nothing is above token 0; 0.4 above token 1, 0.7 above token 2, 0.9 above token 3
        (Intervention("drop", (0, 3)), [0, 0.6, 0.4, 0]),
        (Intervention("force", (0, 3)), [1, 0, 0, 0]),
        (Intervention("force", (1, 3)), None),
        (Intervention("force", (3, 1), threshold=0.41), [0, 1, 0, 0]),
        (Intervention("force", (2, 3), threshold=0.69), None),
        (Intervention("force", (2, 3), threshold=0.71), [0, 0, 1, 0]),
        (Intervention("force", (2,), "rank", 2), None),
        (Intervention("force", (2,), "rank", 3), [0, 0, 1, 0]),
        (Intervention("force", (1, 2), "probability", 0.35), None),
        (Intervention("force", (1, 2), "probability", 0.15), [0, 1, 0, 0]),
    ],
)
def test_hand_worked(intervention, expected):
    p = [0.4, 0.3, 0.2, 0.1]
    logits = torch.tensor([p, p]).log() + 3
    changed, same = intervene(logits, [intervention, None])
    torch.testing.assert_close(changed.softmax(-1), torch.tensor(expected or p, dtype=torch.float32))
    assert torch.equal(same, logits[1])


def test_nothing_to_do_costs_nothing():
    logits = torch.randn(3, 5)
    assert intervene(logits, [None] * 3) is logits


def test_what_intervene_refuses():
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match="1 interventions for 2 rows"):
        intervene(logits, [None])
    with pytest.raises(ValueError, match="5 is outside the vocabulary of 5"):
        intervene(logits, [None, Intervention("force", (5,))])
    with pytest.raises(ValueError, match="whole vocabulary"):
        intervene(logits, [None, Intervention("drop", tuple(range(5)))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("remove", (1,)), "drop or force, not 'remove'"),
        (("force", (1,), "top"), "nucleus, rank or probability, not 'top'"),
        (("drop", ()), "needs token ids"),
        (("drop", (3, -1)), "needs token ids of 0 and above"),
        (("force", (1,), "nucleus", 0.0), "between 0 and 1"),
        (("force", (1,), "nucleus", 1.0), "between 0 and 1"),
        (("force", (1,), "probability", math.nan), "between 0 and 1"),
        (("force", (1,), "rank"), "whole number of 1 or more as threshold, not 0.2"),
        (("force", (1,), "rank", 2.5), "whole number"),
        (("force", (1,), "rank", math.inf), "whole number"),
    ],
)
def test_what_an_intervention_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Intervention(*arguments)


def test_order_and_repeats_of_ids_mean_nothing():
    assert Intervention("drop", (3, 1, 3)) == Intervention("drop", (1, 3))
    assert Intervention("drop", (3, 1, 3)).token_ids == (1, 3)


# The tokens: words and mining.

VOCABULARY = [
    "So",
    "ĠSo",
    "so",
    "Ġso",
    "SO",
    "ĊSo",
    "Sow",
    "ĠsO",
    "I",
    "ĠI",
    "i",
    "Ġi",
    "H",
    "mm",
    "Therefore",
    "x",
    "y",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level spelling: Ġ is a space, Ċ a line break."""
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="Wait")
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def test_the_default_words_are_those_that_the_paper_names():
    named = "So, Let, Hmm, Okay; initiate a thought (So or Hmm), transitions (Since or Therefore), (Let, Then, To)"
    assert set(DEFAULT_WORDS) == set(re.findall(r"\b[A-Z][a-z]+\b", named))
    assert len(DEFAULT_WORDS) == 8


def test_variants(tokenizer):
    words = [*DEFAULT_WORDS, "I", "Wait"]
    expected = {"So": (0, 1, 5), "I": (8, 9), "Therefore": (14,)}  # an end token that reads "Wait" is not it
    assert variant_ids(tokenizer, words) == {word: expected.get(word, ()) for word in words}
    expected["So"] = (0, 1, 2, 3, 4, 5)  # a word of one letter has one case
    assert variant_ids(tokenizer, words, case="any") == {word: expected.get(word, ()) for word in words}
    assert variant_ids(tokenizer, [" so "]) == {"so": (2, 3)}
    assert variant_ids(tokenizer, [" so ", "THEREFORE"], case="any") == {"so": (0, 1, 2, 3, 4, 5), "THEREFORE": (14,)}
    lines = describe(tokenizer, variant_ids(tokenizer, ["I", "Hmm"]))
    assert lines == ["I: 8 'I', 9 ' I'", "Hmm: not one token here, left alone"]


@pytest.mark.parametrize("words", [["Hmm", "Wait"], []])
def test_no_variant_at_all(tokenizer, words):
    with pytest.raises(UserError, match="no token for any of"):
        variant_ids(tokenizer, words)


def write_rollouts(run, *steps: list[dict]) -> None:
    (run / "rollouts").mkdir(parents=True)
    for step, rows in enumerate(steps, start=1):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (run / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")


def rollout(**mi: list[float | None]) -> dict:
    """``token=[scores]`` -> a row; G stands for a space."""
    pairs = [(token.replace("G", "Ġ"), score) for token, scores in mi.items() for score in scores]
    # U+2028 ends a line for str.splitlines, not for JSON
    return {"completion": "a\u2028b", "tokens": [t for t, _ in pairs], "mi": [s for _, s in pairs]}


def test_mining(tokenizer, tmp_path):
    write_rollouts(
        tmp_path,
        [rollout(So=[1.0, 2.0, None], GSo=[0.5] * 4, Wait=[9.0] * 9, y=[8.0, 8.0]), rollout(mm=[None] * 9)],
        [
            rollout(So=[3.0, 4.0, 5.0], GSo=[0.7], x=[0.1] * 5, y=[8.0, 8.0]),
            rollout(**{"<think>": [9.0] * 9, "<no token 99>": [9.0] * 9}),
        ],
    )
    mined = mined_tokens(tmp_path, tokenizer, 10)
    # y is scored 4 times, mm never; Wait ends a turn, <think> is added, id 99 is a row of the model only
    assert [(m.token_id, m.text, m.count) for m in mined] == [(0, "So", 5), (1, " So", 5), (15, "x", 5)]
    assert [m.mean_mi for m in mined] == pytest.approx([3.0, 0.54, 0.1])
    assert str(mined[1]) == "1 ' So': mean MI 0.54, 5 times"
    assert mined_tokens(tmp_path, tokenizer, 2) == mined[:2]
    assert mined_tokens(tmp_path, tokenizer, 1, min_count=4)[0].text == "y"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rollouts/step"),
        ([rollout(So=[None] * 9)], "have no MI scores"),
        ([rollout(So=[1.0] * 4, Wait=[1.0] * 9)], "no ordinary token is scored 5 times"),
        ([rollout(other=[1.0] * 9)], "not of this tokenizer .'other'."),
        ([{"tokens": ["So"]}], "step-000001.jsonl:1 is not a rollout of train.py"),
        ([{"tokens": ["So"], "mi": [1.0, 2.0]}], "is not a rollout of train.py"),
    ],
)
def test_what_cannot_be_mined(tokenizer, tmp_path, rows, message):
    if rows:
        write_rollouts(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        mined_tokens(tmp_path, tokenizer, 5)


def test_mining_none(tokenizer, tmp_path):
    with pytest.raises(UserError, match="1 or more, not 0"):
        mined_tokens(tmp_path, tokenizer, 0)


# The Hugging Face engine.

REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate([[5, 6, 7], [9] * 12, [5, 6, 7], [40, 41]])]
OPTIONS = {"max_model_len": 64, "end_token_ids": [], "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(folder):
    return make_engine("hf", folder, interventions=True, **OPTIONS)


@torch.no_grad()
def distributions(model, prompt, completion) -> torch.Tensor:
    """Logits before each token of the completion, without cache, padding or batch: (n, V)."""
    return model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]


def frequent(completions, count: int) -> tuple[int, ...]:
    drawn = [t for c in completions for t in c.token_ids]
    return tuple(sorted(set(drawn), key=lambda t: -drawn.count(t))[:count])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_dropped_tokens_never_appear(engine, model, temperature):
    free = Sampling(24, temperature, intervention=None)
    ids = frequent(engine.generate(REQUESTS, free), 20)
    completions = engine.generate(REQUESTS, Sampling(24, temperature, intervention=Intervention("drop", ids)))
    for request, completion in zip(REQUESTS, completions):
        assert not set(ids) & set(completion.token_ids)
        logits = distributions(model, request.prompt_ids, completion.token_ids) / (temperature or 1)
        others = [i for i in range(logits.shape[1]) if i not in ids]
        chosen = logits[range(24), completion.token_ids]
        expected = (chosen - logits[:, others].logsumexp(-1)).tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        if temperature == 0:
            assert torch.equal(chosen, logits[:, others].amax(-1))


@pytest.mark.parametrize(("rule", "threshold"), [("nucleus", 0.2), ("rank", 4), ("probability", 0.06)])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.slow
def test_forced_tokens_appear_when_and_only_when_the_rule_says_so(engine, model, rule, threshold, temperature):
    ids = frequent(engine.generate(REQUESTS, Sampling(24)), 20)
    intervention = Intervention("force", ids, rule, threshold)
    sampling = Sampling(24, temperature, top_k=30, intervention=intervention)
    forced = free = 0
    for request, completion in zip(REQUESTS, engine.generate(REQUESTS, sampling)):
        logits = distributions(model, request.prompt_ids, completion.token_ids)
        for row, token, logprob in zip(logits, completion.token_ids, completion.logprobs):
            must, margin = forced_token(softmax(row.tolist()), intervention)  # at temperature 1
            if margin < 1e-4:
                continue
            if must is not None:
                forced += 1
                assert (token, logprob) == (must, 0.0)
            elif temperature == 0:
                free += 1
                assert token == row.argmax()
            else:
                free += 1
                scaled = row / temperature
                assert logprob == pytest.approx((scaled[token] - scaled.topk(30).values.logsumexp(-1)).item(), abs=1e-3)
    assert forced > 10
    assert free > 10


def test_an_engine_serves_both(folder, engine):
    plain = make_engine("hf", folder, **OPTIONS)
    before = plain.generate(REQUESTS, Sampling(24))
    dropping = Sampling(24, intervention=Intervention("drop", frequent(before, 5)))
    assert engine.generate(REQUESTS, dropping) != before
    assert engine.generate(REQUESTS, Sampling(24)) == before
    with pytest.raises(ValueError, match="without interventions=True"):
        plain.generate(REQUESTS, dropping)
