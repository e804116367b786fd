"""HfEngine against plain Hugging Face calls on a tiny random model."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aipo.errors import UserError
from aipo.model.loading import attention_widths
from aipo.rollout import Completion, Request, Sampling, make_engine
from aipo.rollout.base import Stopped, keep_rng
from aipo.rollout.check import check_weight_sync, perturbed
from aipo.rollout.decoding import GROUPED, Fixed, attend
from aipo.rollout.hf import HfEngine, draw, kv_token_bytes, rows_together
from aipo.rollout.injection import Injection, Projections
from tests.tiny import make_tiny

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [5, 6, 7], [11] * 12, [40, 41]]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
SAMPLING = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, top_k=50, min_p=0.01)
EOS = 2
OPTIONS = {"max_model_len": 64, "end_token_ids": [EOS], "dtype": "float32", "seed": 7}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), tied=request.param))


@pytest.fixture(scope="module")
def model(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine_for(folder: str, **options) -> HfEngine:
    """With another seed than the checkpoint's: where nothing is loaded, the weights are others too."""
    return HfEngine(folder, **OPTIONS | options)


@torch.no_grad()
def full_logprobs(model, prompt, completion, temperature=1.0) -> list[float]:
    """Without cache, padding or batch."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(completion)), completion].tolist()


@pytest.mark.slow
def test_a_request_does_not_depend_on_its_company(folder):
    engine = engine_for(folder)
    together = engine.generate(REQUESTS, SAMPLING)
    alone = [engine.generate([request], SAMPLING)[0] for request in REQUESTS]
    small = engine_for(folder, batch_size=2).generate(REQUESTS, SAMPLING)
    for others in (alone, small):
        assert [c.token_ids for c in together] == [c.token_ids for c in others]
        for a, b in zip(together, others):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert together[0].token_ids != together[2].token_ids  # one prompt, two seeds


@pytest.mark.parametrize(("longest", "batches"), [(64, [200]), (300, [109, 91]), (512, [64, 64, 64, 8])])
def test_more_sequences_are_generated_together_while_they_are_short(folder, monkeypatch, longest, batches):
    whole, seen = HfEngine._generate_batch, []

    def spy(self, batch, *rest):
        seen.append(len(batch))
        whole(self, batch, *rest)

    monkeypatch.setattr(HfEngine, "_generate_batch", spy)
    requests = [Request([5, 6, 7], seed) for seed in range(200)]
    engine_for(folder, max_model_len=longest).generate(requests, dataclasses.replace(SAMPLING, max_tokens=1))
    assert seen == batches
    assert [rows_together(length) for length in (1, 12_288)] == [256, 64]


def test_no_more_are_generated_together_than_the_cache_may_take():
    assert [rows_together(100, cached) for cached in (10**9, 2_099, 100, 0)] == [256, 20, 1, 1]


def test_what_a_token_takes_in_the_cache(model):
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    taken = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    _, width = attention_widths(model.config)
    assert taken == 3 * kv_token_bytes(model.config.num_hidden_layers, width, 4)


def test_an_engine_that_sleeps_holds_no_weights_until_a_sync_brings_them(folder, model):
    engine = engine_for(folder)
    before = engine.generate(REQUESTS, SAMPLING)
    for weight in engine._model.parameters():
        weight.data = weight.data.clone()  # no longer a part of the file, as on a GPU
    device, engine._device = engine._device, torch.device("cuda")  # for two calls
    engine.sleep()
    engine.sleep()
    engine._device = device
    assert all(p.untyped_storage().nbytes() == 0 for p in engine._model.parameters())
    with pytest.raises(RuntimeError, match="sleeps"):
        engine.generate(REQUESTS, SAMPLING)
    for _ in range(2):
        engine.sync(model.named_parameters())
        assert engine.generate(REQUESTS, SAMPLING) == before


def test_a_fixed_cache_draws_what_a_growing_one_does(folder, monkeypatch):
    """With rows that end early, so that they are dropped, and a cache that is laid out anew again and again."""
    monkeypatch.setattr("aipo.rollout.decoding.ROOM", 3)
    monkeypatch.setattr("aipo.rollout.decoding.PAYS_FROM", 0)  # on a GPU as CUDA graphs
    laid_out = []
    lay_out = Fixed._lay_out
    monkeypatch.setattr(Fixed, "_lay_out", lambda self: lay_out(self) or laid_out.append(self.mask.shape))
    budgets = [30, 7, 2, 40, 12]
    requests = [dataclasses.replace(r, max_tokens=b) for r, b in zip(REQUESTS, budgets)]
    growing = engine_for(folder, fixed_cache=False).generate(requests, SAMPLING)
    assert not laid_out
    fixed = engine_for(folder, fixed_cache=True).generate(requests, SAMPLING)
    assert Fixed.graphs  # none was given up
    assert [shape[0] for shape in laid_out][-1] < len(requests) / 2
    assert max(shape[-1] for shape in laid_out) > min(shape[-1] for shape in laid_out)
    for a, b in zip(growing, fixed):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_heads_that_share_keys_ask_them_once(heads, groups, kind):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups
    query, key, value = (torch.randn(3, n, s, 16) for n, s in ((heads, 1), (groups, 11), (groups, 11)))
    mask = torch.rand(3, 1, 1, 11) < 0.7
    mask[..., 0] = True
    mask = mask if kind is torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    keys = []

    def spy(query, key, *rest, **kwargs):
        keys.append(key)
        return F.scaled_dot_product_attention(query, key, *rest, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aipo.rollout.decoding.F", SimpleNamespace(scaled_dot_product_attention=spy))
        out, _ = attend(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(out, expected)
    assert heads == groups or [id(each) for each in keys] == [id(key)]


def test_logprobs_are_those_of_a_full_forward(folder, model):
    engine = engine_for(folder)
    assert engine._model.config._attn_implementation == GROUPED
    completions = engine.generate(REQUESTS, Sampling(max_tokens=12, temperature=0.7))
    for prompt, completion in zip(PROMPTS, completions):
        expected = full_logprobs(model, prompt, completion.token_ids, 0.7)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_greedy_equals_generate(folder, model):
    completions = engine_for(folder).generate(REQUESTS, Sampling(max_tokens=12, temperature=0))
    for prompt, completion in zip(PROMPTS, completions):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert completion.token_ids == expected.tolist()
        assert completion.logprobs == pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-4)


def test_a_draw_ends_at_the_next_token_once_it_is_stopped(folder):
    engine, stopped_at = engine_for(folder, end_token_ids=[]), []

    def stop(i: int, completion: Completion) -> None:
        stopped_at.append(i)
        engine.stopped.set()

    requests = [Request(REQUESTS[0].prompt_ids, seed=i, max_tokens=3 + 5 * i) for i in range(2)]
    with pytest.raises(Stopped):
        engine.generate(requests, SAMPLING, on_done=stop)
    assert stopped_at == [0]


def test_end_tokens_length_and_on_done(folder):
    free = engine_for(folder, end_token_ids=[]).generate(REQUESTS, SAMPLING)
    assert all(c.finish_reason == "length" and len(c.token_ids) == 12 for c in free)
    end = free[1].token_ids[4]
    seen: dict[int, Completion] = {}
    ended = engine_for(folder, end_token_ids=[end]).generate(REQUESTS, SAMPLING, on_done=seen.__setitem__)
    for before, after in zip(free, ended):
        if end in before.token_ids:
            cut = before.token_ids.index(end) + 1
            assert (after.token_ids, after.finish_reason) == (before.token_ids[:cut], "stop")
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, "length")
    assert ended[1].finish_reason == "stop"
    assert [seen[i] for i in range(len(REQUESTS))] == ended


def test_requests_have_budgets_of_their_own(folder):
    budgets = [3, None, 12, 1, 5]
    requests = [dataclasses.replace(r, max_tokens=b) for r, b in zip(REQUESTS, budgets)]
    engine = engine_for(folder, end_token_ids=[])
    for whole, short, budget in zip(engine.generate(REQUESTS, SAMPLING), engine.generate(requests, SAMPLING), budgets):
        assert short.token_ids == whole.token_ids[: budget or 12]
        assert short.logprobs == pytest.approx(whole.logprobs[: budget or 12], abs=1e-4)
        assert short.finish_reason == "length"
    fits = [Request([5] * 60, 0, max_tokens=4)]  # the sampling's 12 would not
    assert len(engine.generate(fits, SAMPLING)[0].token_ids) == 4
    with pytest.raises(ValueError, match="60 tokens and 5 new ones"):
        engine.generate([Request([5] * 60, 0, max_tokens=5)], SAMPLING)


def test_draw_follows_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    sampling = Sampling(max_tokens=1, temperature=0.5, top_k=4, top_p=0.9, min_p=0.01)
    # By hand: at temperature 0.5 the weights are exp(4, 2, 0, -2, -4); min-p 0.01 drops those under 1 % of the first,
    # which leaves the first three; of these the first two hold more than 90 %.
    weights = torch.tensor([4.0, 2.0]).exp()
    expected = weights / weights.sum()
    n = 4000
    tokens, logprobs = draw(logits.expand(n, -1), sampling, [torch.Generator().manual_seed(i) for i in range(n)])
    frequency = torch.bincount(tokens, minlength=5) / n
    assert frequency[2:].sum() == 0
    torch.testing.assert_close(frequency[:2], expected, atol=0.02, rtol=0)
    torch.testing.assert_close(logprobs.exp(), expected[tokens])


def test_sync_replaces_every_weight(folder, model):
    engine = engine_for(folder, load_weights=False)
    other = dict(perturbed(model.named_parameters(), seed=3))
    engine.sync(other.items())
    drawn = engine.generate(REQUESTS, Sampling(max_tokens=8))
    changed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    changed.load_state_dict(other, strict=False)
    for prompt, completion in zip(PROMPTS, drawn):
        assert completion.logprobs == pytest.approx(full_logprobs(changed, prompt, completion.token_ids), abs=1e-3)
        assert completion.logprobs != pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1)


def test_sync_names_missing_weights(folder, model):
    engine = engine_for(folder)
    incomplete = [(name, p) for name, p in model.named_parameters() if "layers.1.self_attn.q_norm" not in name]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_norm\.weight"):
        engine.sync(incomplete)


def test_start_up_check_passes_and_fails(folder, model):
    def logprobs(prompt, completion, temperature):
        return full_logprobs(model, prompt, completion, temperature)

    engine = engine_for(folder, load_weights=False)
    assert check_weight_sync(engine, model.named_parameters, logprobs, PROMPTS) < 1e-4

    class OneStaysStale(HfEngine):
        def sync(self, weights):
            projection = self._model.model.layers[1].mlp.down_proj.weight
            before = projection.clone()
            super().sync(weights)
            projection.data.copy_(before)

    stale = OneStaysStale(folder, load_weights=False, **OPTIONS)
    with pytest.raises(UserError, match="does not follow the trained weights"):
        check_weight_sync(stale, model.named_parameters, logprobs, PROMPTS)


@pytest.mark.parametrize(
    ("request_", "message"), [(Request([], 0), "empty prompt"), (Request([5] * 60, 0), "context of 64")]
)
def test_requests_that_do_not_fit(folder, request_, message):
    with pytest.raises(ValueError, match=message):
        engine_for(folder).generate([request_], SAMPLING)


def test_random_state_is_kept(folder):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with keep_rng():
        torch.rand(3)
    engine_for(folder, load_weights=False).generate(REQUESTS, SAMPLING)
    assert torch.equal(before, torch.get_rng_state())


# -- latents

LATENT = 6


def injection_for(rule: str, **changes) -> Injection:
    torch.manual_seed(5)
    z = torch.randn(len(PROMPTS), LATENT)
    options = {"z": z, "scale": 0.4, "half_life": 3.0} | changes
    return Injection(rule, Projections(width=64, layers=2, kv_width=64, latent=LATENT), **options)


@torch.no_grad()
def changed_logprobs(model, prompt, completion, injection, row) -> list[float]:
    """The definition, in one forward of the whole sequence: the t-th new token is drawn at position start + t."""
    z, start, length = injection.z[row], len(prompt) - 1, len(prompt) + len(completion)
    strength = [injection.scale * 0.5 ** ((at - start) / injection.half_life) * (at >= start) for at in range(length)]
    cache, mask = None, None
    with ExitStack() as stack:
        if injection.rule == "norm_kv":
            change = torch.stack([s * (injection.projections.norm @ z) for s in strength])  # (S, 64)
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    stack.enter_context(norm.register_forward_hook(lambda m, i, o: o * (1 + change)))
            stack.enter_context(model.model.norm.register_forward_hook(lambda m, i, o: o * (1 + change)))
            cache = DynamicCache(config=model.config)
            for number in range(2):
                key, value = (each[number] @ z for each in (injection.projections.keys, injection.projections.values))
                cache.update(key.reshape(1, 2, 1, 32), value.reshape(1, 2, 1, 32), number)
            mask = torch.full((length, 1 + length), -torch.inf)
            for at in range(length):
                mask[at, 1 : at + 2] = 0
                if at >= start:
                    mask[at, 0] = torch.log(injection.scale * z.square().mean().sqrt())
            mask = mask[None, None]
        else:
            change = torch.stack([s * (injection.projections.residual @ z) for s in strength])  # (S, 64)
            for layer in model.model.layers:
                stack.enter_context(layer.register_forward_hook(lambda m, i, o: o + change))
        logits = model(
            torch.tensor([[*prompt, *completion]]),
            attention_mask=mask,
            past_key_values=cache,
            position_ids=torch.arange(length)[None],
        ).logits[0, start:-1]
    return logits.log_softmax(-1)[range(len(completion)), completion].tolist()


@pytest.mark.parametrize("rule", ["norm_kv", "residual"])
def test_latents_change_the_model_as_defined(folder, model, rule):
    injection = injection_for(rule)
    completions = engine_for(folder).generate(REQUESTS, Sampling(max_tokens=12), injection=injection)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions)):
        expected = changed_logprobs(model, prompt, completion.token_ids, injection, row)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        assert completion.logprobs != pytest.approx(full_logprobs(model, prompt, completion.token_ids), abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["norm_kv", "residual"])
def test_rows_with_different_latents_do_not_mix(folder, rule):
    injection = injection_for(rule)
    engine = engine_for(folder)
    together = engine.generate(REQUESTS, SAMPLING, injection=injection)
    for row, request in enumerate(REQUESTS):
        (alone,) = engine.generate([request], SAMPLING, injection=injection.rows(torch.tensor([row])))
        assert alone.token_ids == together[row].token_ids
        assert alone.logprobs == pytest.approx(together[row].logprobs, abs=1e-4)
    twins = [Request(PROMPTS[0], 0)] * len(PROMPTS)  # the same request under five latents
    drawn = engine.generate(twins, Sampling(max_tokens=12), injection=injection)
    assert len({tuple(c.logprobs) for c in drawn}) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["norm_kv", "residual"])
def test_no_latent_changes_nothing(folder, rule):
    engine = engine_for(folder)
    plain = engine.generate(REQUESTS, SAMPLING)
    injection = injection_for(rule)
    for nothing in (dataclasses.replace(injection, scale=0.0), injection_for(rule, z=torch.zeros(5, LATENT))):
        assert engine.generate(REQUESTS, SAMPLING, injection=nothing) == plain
    # and little changes little: the mechanism itself vanishes, not only at zero
    little = engine.generate(REQUESTS, SAMPLING, injection=injection_for(rule, scale=1e-7))
    for a, b in zip(plain, little):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    # a zero row among others draws as without
    z = injection.z.clone()
    z[3] = 0
    mixed = engine.generate(REQUESTS, SAMPLING, injection=dataclasses.replace(injection, z=z))
    assert mixed[3].token_ids == plain[3].token_ids
    assert [c.logprobs for c in mixed[:3]] != [c.logprobs for c in plain[:3]]
    assert engine.generate(REQUESTS, SAMPLING) == plain  # no hook is left behind


def test_a_residual_is_added_after_each_of_the_last_four_layers():
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(6))
    model: Any = SimpleNamespace(base_model=SimpleNamespace(layers=layers))
    injection = injection_for("residual")
    states = torch.ones(len(PROMPTS), 1, 64)
    added = 0.4 * 0.5 ** (2 / 3) * injection.z @ injection.projections.residual.T  # at token 2, half as much every 3
    with injection.hooks(model, 2):
        for i, layer in enumerate(layers):
            torch.testing.assert_close(layer(states)[:, 0] - 1, added if i >= 2 else torch.zeros_like(added))
            assert i < 2 or torch.equal(layer((states, 7))[0], layer(states))  # a layer that returns more
    assert all(layer(states) is states for layer in layers)


def test_latents_that_cannot_be_used(folder):
    engine, injection = engine_for(folder), injection_for("residual")
    with pytest.raises(ValueError, match="5 latents for 4 requests"):
        engine.generate(REQUESTS[:4], SAMPLING, injection=injection)
    with pytest.raises(ValueError, match="two tokens or more"):
        engine.generate([*REQUESTS[:4], Request([5], 0)], SAMPLING, injection=injection)


def test_a_latent_goes_to_a_device_as_a_copy():
    injection = injection_for("norm_kv")
    there = injection.to(torch.device("meta"))
    assert there.z.is_meta
    assert all(matrix.is_meta for matrix in there.projections.buffers())
    assert not any(matrix.is_meta for matrix in injection.projections.buffers())  # other batches and saving need them


def test_mean_states_are_those_of_a_full_forward(folder, model):
    sequences, cuts = [[*p, 20, 21] for p in PROMPTS], [3, 0, 5, 14, 2]
    means = engine_for(folder, batch_size=2).mean_states(sequences, cuts)
    for sequence, cut, mean in zip(sequences, cuts, means):
        with torch.no_grad():
            states = model.base_model(torch.tensor([sequence])).last_hidden_state[0]
        before = states[:cut].mean(0) if cut else torch.zeros(64)
        after = states[cut:].mean(0) if cut < len(sequence) else torch.zeros(64)
        torch.testing.assert_close(mean, torch.stack([before, after]), atol=1e-4, rtol=1e-4)


def test_vllm_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr("aipo.rollout.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install vllm"):
        make_engine("vllm", "any")
