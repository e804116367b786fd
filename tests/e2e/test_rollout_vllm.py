"""The real vLLM against plain Hugging Face forwards on tiny models. Run as a script, this file is one rank."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from aipo.errors import UserError
from aipo.rollout import Completion, Request, Sampling, make_engine
from aipo.rollout.check import TOLERANCE, check_weight_sync, logprob_gap, perturbed
from aipo.rollout.vllm import VllmEngine
from aipo.threads import cpu_threads
from tests import processes
from tests.e2e.launch import torchrun, two_vllm
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

EOS = 2
PROMPTS = [[5, 6, 7], [9] * 40, [5, 6, 7] + [9] * 70, [20, 21]]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS * 2)]
SAMPLING = Sampling(max_tokens=24)
OPTIONS = {"max_model_len": 128, "end_token_ids": [EOS], "kv_cache_gb": 0.1}


@torch.no_grad()
def hf_logprobs(model, prompt, completion, temperature=1.0) -> list[float]:
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)[range(len(completion)), completion].tolist()


def gap(engine: VllmEngine, model: PreTrainedModel, sampling: Sampling = SAMPLING) -> float:
    """Mean difference in nats between what the engine reports for its draws and a Hugging Face forward."""
    completions = engine.generate(REQUESTS, sampling)
    ours = [x for c in completions for x in c.logprobs]
    temperature = sampling.temperature or 1.0
    theirs = [
        x for r, c in zip(REQUESTS, completions) for x in hf_logprobs(model, r.prompt_ids, c.token_ids, temperature)
    ]
    return logprob_gap(ours, theirs)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny"), tied=request.param))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[VllmEngine]:
    """Starts from random weights; building it must leave random states and threads as they were."""
    before = (random.getstate(), torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads)
    engine = make_engine("vllm", folder, load_weights=False, **OPTIONS)
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2:] == (torch.get_num_threads(), torch.set_num_threads)
    yield engine
    engine.close()


@pytest.fixture
def model(folder) -> PreTrainedModel:
    """A fresh copy, for tests to perturb."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def synced(engine, model) -> VllmEngine:
    engine.sync(model.named_parameters())
    return engine


def test_more_prompts_than_one_pass_of_the_model_takes(engine: VllmEngine) -> None:
    """vLLM would read a prompt in two parts, and on CPU cannot take back what it drew after the first."""
    requests = [Request([5 + i, *[9] * 99], i) for i in range(60)]  # 6000 tokens, 4096 a pass
    drawn = engine.generate(requests, Sampling(max_tokens=3))
    assert [c.token_ids for c in drawn[:3]] == [
        c.token_ids for c in engine.generate(requests[:3], Sampling(max_tokens=3))
    ]


def test_sync_brings_every_weight(engine, model):
    true = {name: p.detach().clone() for name, p in model.named_parameters()}
    for strength in (1.0, 0.3):
        other = dict(perturbed(true.items(), seed=1, strength=strength))
        engine.sync(other.items())
        assert gap(engine, model) > 1.0  # the model is unperturbed still
        model.load_state_dict(other, strict=False)
        model.tie_weights()
        assert gap(engine, model) < TOLERANCE
        model.load_state_dict(true, strict=False)
    engine.sync(true.items())
    assert gap(engine, model) < TOLERANCE


def test_a_stale_tied_head_is_noticed(engine, model, monkeypatch):
    """vLLM on CPU may keep a packed copy of the head, on some machines: here one is made, and never renewed."""
    if not model.config.tie_word_embeddings:
        pytest.skip("an untied head is one of the weights")
    assert check_weight_sync(engine, model.named_parameters, lambda *a: hf_logprobs(model, *a), PROMPTS) < TOLERANCE
    other = dict(perturbed(model.named_parameters(), seed=2))
    engine.sync(other.items())

    def pack(vllm_model):
        head, packed = vllm_model.lm_head, vllm_model.lm_head.weight.detach().clone()
        monkeypatch.setattr(head.quant_method, "apply", lambda layer, x, bias=None: linear(x, packed, bias))

    engine._llm.apply_model(pack)
    with pytest.raises(UserError, match="does not follow the trained weights"):
        check_weight_sync(engine, model.named_parameters, lambda *a: hf_logprobs(model, *a), PROMPTS)


@torch.no_grad()
def test_what_was_synced_is_the_engines_own(engine, model):
    """The optimizer changes weights in place while the engine draws; those of its dtype it got without a copy."""
    weights = dict(model.bfloat16().named_parameters())
    engine.sync(weights.items())
    before = engine.generate(REQUESTS, SAMPLING)
    for weight in weights.values():
        weight.zero_()
    assert engine.generate(REQUESTS, SAMPLING) == before
    engine.sync(weights.items())
    assert engine.generate(REQUESTS, SAMPLING) != before


@pytest.mark.parametrize("temperature", [0.6, 1.0, 0.0])
def test_logprobs_are_after_temperature(synced, model, temperature):
    assert gap(synced, model, Sampling(max_tokens=24, temperature=temperature)) < TOLERANCE


@torch.no_grad()
def test_filters_renormalise(synced, model):
    """With top-k 4 each token's log-probability is relative to the four best, so about 2 nats above the full one."""
    ours, full, of_four = [], [], []
    for request, completion in zip(REQUESTS, synced.generate(REQUESTS, Sampling(max_tokens=16, top_k=4))):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        chosen = logits[range(len(logits)), completion.token_ids]
        ours += completion.logprobs
        full += (chosen - logits.logsumexp(-1)).tolist()
        of_four += (chosen - logits.topk(4).values.logsumexp(-1)).tolist()
    assert logprob_gap(ours, of_four) < TOLERANCE
    assert logprob_gap(ours, full) > 0.5


def test_results_depend_on_nothing_before(synced):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = synced.generate(REQUESTS, SAMPLING)
    assert torch.equal(before, torch.get_rng_state())
    synced.generate(REQUESTS[::-1], Sampling(max_tokens=3))
    torch.manual_seed(1)
    assert synced.generate(REQUESTS, SAMPLING) == first
    assert first[0].token_ids != first[4].token_ids  # one prompt, two seeds


def test_end_tokens_and_on_done(synced):
    seen: dict[int, Completion] = {}
    completions = synced.generate(REQUESTS, SAMPLING, on_done=seen.__setitem__)
    assert [seen[i] for i in range(len(REQUESTS))] == completions
    end = completions[0].token_ids[5]
    synced._end_token_ids = [end]
    try:
        for before, after in zip(completions, synced.generate(REQUESTS, SAMPLING)):
            if end in before.token_ids:
                cut = before.token_ids.index(end) + 1
                assert (after.token_ids, after.finish_reason) == (before.token_ids[:cut], "stop")
            elif before.finish_reason == "length":
                assert (after.token_ids, after.finish_reason) == (before.token_ids, "length")
            assert len(after.logprobs) == len(after.token_ids)
    finally:
        synced._end_token_ids = [EOS]


def test_errors_surface_and_leave_a_working_engine(synced, model):
    before = synced.generate(REQUESTS, SAMPLING)

    def interrupt(i, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synced.generate(REQUESTS, SAMPLING, on_done=interrupt)
    with pytest.raises(ValueError, match="context of 128"):
        synced.generate([Request([5] * 120, 0)], SAMPLING)
    assert synced.generate(REQUESTS, SAMPLING) == before

    def broken():
        yield from list(model.named_parameters())[:5]
        raise OSError("gather failed")

    with pytest.raises(OSError, match="gather failed"):
        synced.sync(broken())
    with pytest.raises(ValueError, match=r"sync brought no model\.norm\.weight"):
        synced.sync((name, p) for name, p in model.named_parameters() if name != "model.norm.weight")
    synced.sync(model.named_parameters())
    assert synced.generate(REQUESTS, SAMPLING) == before


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=two_vllm)])
def test_under_a_launcher(tmp_path, ranks):
    """The trainer owns the process group; each rank has its own engine and as much work as it likes."""
    folder = make_tiny(tmp_path / "tiny")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_WAIT_POLICY": "PASSIVE"}
    done = processes.run([*torchrun(ranks), __file__, str(folder)], env=environment)
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} is done" in done.stdout for rank in range(ranks))


def one_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(cpu_threads())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        """A collective per weight, as the gather of ZeRO-3 is."""
        for name, p in model.named_parameters():
            dist.broadcast(tensor := p.detach().clone(), src=0)
            yield name, tensor

    engine = VllmEngine(folder, load_weights=False, seed=rank, **OPTIONS)
    assert torch.get_num_threads() == cpu_threads()
    assert os.environ["LOCAL_WORLD_SIZE"] == str(world)
    assert check_weight_sync(engine, weights, lambda *a: hf_logprobs(model, *a), PROMPTS[:2]) < TOLERANCE
    # Different questions, counts and lengths: an engine that waited for another would hang.
    requests = [Request([5, 6, 7 + rank], seed) for seed in range(3 + 6 * rank)]
    completions = engine.generate(requests, Sampling(max_tokens=5 + 15 * rank))
    assert len(completions) == len(requests)
    if rank == 0:
        engine.generate(requests, SAMPLING)
    drawn: list[list[int]] = [[]] * world
    dist.all_gather_object(drawn, completions[0].token_ids)
    assert len({tuple(ids) for ids in drawn}) == world
    engine.sync(weights())
    synced = engine.generate(requests, SAMPLING)
    engine.close()
    dist.all_reduce(torch.ones(1))  # the process group outlives the engine

    loaded = VllmEngine(folder, **OPTIONS)
    assert loaded.generate(requests, SAMPLING) == synced
    loaded.close()
    print(f"rank {rank} is done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(sys.argv[1])
