"""MI-DROP and MI-FORCE in the real vLLM: against the Hugging Face engine on the embedded model, and both of vLLM's
processor interfaces against their own bookkeeping."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aipo.problems.embedded import embedded_model
from aipo.rollout import Request, RolloutEngine, Sampling, make_engine
from aipo.rollout.interventions import DEFAULT_WORDS, Intervention, intervene, variant_ids
from aipo.rollout.vllm import VllmEngine, intervention_processor

pytestmark = pytest.mark.e2e

QUESTIONS = ["Why is the sky blue?", "What is 17 + 25? Think step by step.", "Plan a picnic.", "Name a prime above 10."]
TOKENS = 24
# In float32 the best two tokens are never so close that the engines' rounding decides between them.
OPTIONS = {"max_model_len": 128, "dtype": "float32", "interventions": True}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def requests_(tokenizer) -> list[Request]:
    def prompt(question):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )

    return [Request(prompt(question), seed) for seed, question in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def vllm(tokenizer) -> Iterator[VllmEngine]:
    end = [tokenizer.eos_token_id]
    engine = make_engine("vllm", str(embedded_model()), end_token_ids=end, kv_cache_gb=0.2, **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hf(tokenizer) -> RolloutEngine:
    return make_engine("hf", str(embedded_model()), end_token_ids=[tokenizer.eos_token_id], **OPTIONS)


@pytest.fixture(scope="module")
def ids(tokenizer) -> tuple[int, ...]:
    """The default words and some that the model likes to use, so that something happens at once."""
    words = [*DEFAULT_WORDS, "The", "A", "We", "Is", "Of", "And"]
    return tuple(i for each in variant_ids(tokenizer, words).values() for i in each)


@pytest.fixture(scope="module")
def interventions(ids) -> dict[str, Intervention | None]:
    return {
        "none": None,
        "drop": Intervention("drop", ids),
        "force": Intervention("force", ids, threshold=0.5),
        "force by rank": Intervention("force", ids, "rank", 4),
        "force by probability": Intervention("force", ids, "probability", 0.1),
    }


def test_both_engines_give_the_same_greedy_text(vllm, hf, requests_, tokenizer, interventions, ids):
    texts = {}
    for name, intervention in interventions.items():
        sampling = Sampling(TOKENS, temperature=0, intervention=intervention)
        ours, theirs = vllm.generate(requests_, sampling), hf.generate(requests_, sampling)
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs], name
        for a, b in zip(ours, theirs):
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3), name
        texts[name] = tokenizer.batch_decode([c.token_ids for c in ours])
        used = [t in ids for c in ours for t in c.token_ids]
        zero = [x == 0 for c in ours for x in c.logprobs]
        if name == "drop":
            assert not any(used)
        else:
            assert any(used)
        if name.startswith("force"):
            assert any(zero)
    for name in texts.keys() - {"none"}:
        assert texts[name] != texts["none"], name


def test_an_engine_serves_both_at_once(vllm, requests_, interventions):
    """Requests of one batch, each with its own intervention, get what they get alone."""
    samplings = [
        Sampling(TOKENS, temperature=0.6, top_p=0.95, top_k=20, intervention=i) for i in interventions.values()
    ]
    alone = [[c.token_ids for c in vllm.generate(requests_, sampling)] for sampling in samplings]
    pairs = [(r, s) for s in samplings for r in requests_]
    random.Random(0).shuffle(pairs)
    prompts = [{"prompt_token_ids": request.prompt_ids} for request, _ in pairs]
    outputs = vllm._llm.generate(prompts, [vllm._params(r, s) for r, s in pairs], use_tqdm=False)
    for (request, sampling), output in zip(pairs, outputs):
        expected = alone[samplings.index(sampling)][requests_.index(request)]
        assert list(output.outputs[0].token_ids) == expected


def test_an_engine_built_without_refuses(vllm, requests_, interventions, monkeypatch):
    monkeypatch.setattr(vllm, "_interventions", False)
    with pytest.raises(ValueError, match="without interventions=True"):
        vllm.generate(requests_, Sampling(1, intervention=interventions["drop"]))


# The processor, driven by the very classes that drive it inside vLLM.

VOCABULARY, SLOTS = 12, 6
CHOICES = [None, Intervention("drop", (1, 2)), Intervention("force", (3, 4), "rank", 5), Intervention("drop", (7,))]


def params(intervention: Intervention | None):
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if intervention is None else {"aipo_intervention": intervention})


@pytest.mark.parametrize("seed", range(20))
def test_v1_rows_follow_their_requests(seed):
    """Requests come, go, move into gaps and change places in a real ``InputBatch``."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    processor = intervention_processor()(None, torch.device("cpu"), False)
    processors = LogitsProcessors([processor])
    assert processors.non_argmax_invariant == [processor]  # greedy requests are served too
    batch = InputBatch(
        max_num_reqs=SLOTS,
        max_model_len=8,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=VOCABULARY,
        block_sizes=[8],
        max_num_blocks_per_req=[1],
        logitsprocs=processors,
    )
    wanted: dict[str, Intervention | None] = {}
    for step in range(60):
        for name in draw.sample(sorted(wanted), draw.randint(0, len(wanted)) if draw.random() < 0.5 else 0):
            batch.remove_request(name)
            del wanted[name]
        for i in range(draw.randint(0, SLOTS - len(wanted)) if draw.random() < 0.5 else 0):
            name, intervention = f"{step}-{i}", draw.choice(CHOICES)
            wanted[name] = intervention
            state = CachedRequestState(
                req_id=name,
                prompt_token_ids=[1, 2],
                mm_features=[],
                sampling_params=params(intervention),
                generator=None,
                block_ids=([0],),
                num_computed_tokens=0,
                output_token_ids=[],
            )
            batch.add_request(state)
        batch.condense()
        if len(wanted) > 1 and draw.random() < 0.5:
            batch.swap_states(*draw.sample(range(len(wanted)), 2))
        batch.refresh_metadata()
        logits = torch.randn(len(wanted), VOCABULARY, generator=generator)
        expected = intervene(logits, [wanted[name] for name in batch.req_ids])
        assert torch.equal(processor.apply(logits.clone()), expected)


@pytest.mark.parametrize("seed", range(5))
def test_v2_rows_follow_their_requests(seed):
    """Slots are reused, and rows stand in another order at every step."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, build_custom_logits_processors
    from vllm.v1.worker.gpu.states import RequestState

    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    states = RequestState(SLOTS, 8, 64, 0, VOCABULARY, torch.device("cpu"))
    (processor,) = build_custom_logits_processors(None, states, False, [intervention_processor()])
    wanted: dict[str, Intervention | None] = {}
    for step in range(60):
        for name in draw.sample(sorted(wanted), draw.randint(0, len(wanted)) if draw.random() < 0.5 else 0):
            states.remove_request(name)
            del wanted[name]
        for i in range(draw.randint(0, SLOTS - len(wanted)) if draw.random() < 0.5 else 0):
            name, intervention = f"{step}-{i}", draw.choice(CHOICES)
            wanted[name] = intervention
            states.add_request(name, 2, [1, 2], 0, 4)
            changes = processor.add_request(states.req_id_to_index[name], params(intervention))
            assert changes == (intervention is not None)
        processor.apply_staged_writes()
        names = draw.sample(sorted(wanted), draw.randint(0, len(wanted)))  # not all are scheduled
        slots = np.array([states.req_id_to_index[name] for name in names], dtype=np.int32)
        n = len(names)
        context = LogitsContext(
            expanded_idx_mapping=torch.from_numpy(slots),
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            expanded_local_pos=torch.zeros(n, dtype=torch.int32),
            input_ids=torch.ones(n, dtype=torch.int32),
            pos=torch.full((n,), 2),
            seq_lens_upper_bound_np=np.full(n, 3),
        )
        logits = torch.randn(n, VOCABULARY, generator=generator)
        expected = intervene(logits, [wanted[name] for name in names])
        assert torch.equal(processor.apply(logits.clone(), context), expected)
