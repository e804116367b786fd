"""A real vLLM server on the tiny model: the same tokens as the engine in the process, weights, training, its death."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aipo.errors import TrainingError, UserError
from aipo.rollout import Completion, Request, Sampling, make_engine
from aipo.rollout.check import TOLERANCE, check_weight_sync, logprob_gap, perturbed
from aipo.rollout.interventions import Intervention
from aipo.rollout.server import ServerEngine
from tests.e2e.launch import ROOT, train, two_vllm
from tests.e2e.test_rollout_vllm import EOS, PROMPTS, REQUESTS, SAMPLING, gap, hf_logprobs
from tests.processes import Guard
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

DTYPE = "float32"  # whatever the machine gains from: the two are compared
CONTEXT = 208  # data.max_prompt_tokens + rollout.max_tokens of configs/tiny.yaml


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen]]:
    """Its address, and the process whose group it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "aipo.rollout.server", "--config", "tiny.yaml", f"--port={port}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, f"model.path={folder}", f"model.dtype={DTYPE}"],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url, guard = f"http://127.0.0.1:{port}", Guard(process.pid)
    try:
        while not alive(url):
            assert process.poll() is None, log.read_text()[-4000:]
            guard.check()
            time.sleep(0.5)
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alive(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def connect(folder: str, url: str, **options) -> ServerEngine:
    usual = {"urls": [url], "max_model_len": CONTEXT, "end_token_ids": [EOS], "dtype": DTYPE}
    engine = make_engine("server", folder, **(usual | options))
    assert isinstance(engine, ServerEngine)
    return engine


@pytest.fixture(scope="module")
def engine(folder, server) -> ServerEngine:
    """Left by the last test."""
    return connect(folder, server[0])


@pytest.fixture
def model(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_server_for_something_else_is_refused(folder, server):
    url, _ = server
    for options, words in [
        ({"max_model_len": 500}, "reads 208 tokens, the run needs 500"),
        ({"urls": ["http://127.0.0.1:9"]}, "no vLLM server answers at http://127.0.0.1:9"),
    ]:
        with pytest.raises(UserError, match=words):
            connect(folder, url, **options)
    other = make_tiny(Path(folder).with_name("other"))
    with pytest.raises(UserError, match=r"not .*other: start it with: python -m aipo\.rollout\.server"):
        connect(str(other), url)


def test_weights_arrive(engine, model):
    assert check_weight_sync(engine, model.named_parameters, lambda *a: hf_logprobs(model, *a), PROMPTS) < TOLERANCE
    other = dict(perturbed(model.named_parameters(), seed=1))
    engine.sync(other.items())
    assert gap(engine, model) > 1.0  # the model is unperturbed still


def test_as_the_engine_in_the_process(engine, model, folder):
    engine.sync(model.named_parameters())
    samplings = [SAMPLING, Sampling(max_tokens=24, temperature=0.0), Sampling(max_tokens=24, temperature=0.6, top_k=4)]
    requests = [*REQUESTS, Request([5, 6, 7], 3, max_tokens=5)]
    seen: dict[int, Completion] = {}
    served = [engine.generate(requests, sampling, on_done=seen.__setitem__) for sampling in samplings]
    assert [seen[i] for i in range(len(requests))] == served[-1]
    assert len(served[0][-1].token_ids) <= 5
    assert served[0][0].token_ids != served[0][4].token_ids  # one prompt, two seeds
    with pytest.raises(ValueError, match="cannot intervene"):
        engine.generate(requests, Sampling(max_tokens=2, intervention=Intervention("drop", (3,))))
    colocated = make_engine("vllm", folder, max_model_len=CONTEXT, end_token_ids=[EOS], kv_cache_gb=0.1, dtype=DTYPE)
    try:
        for sampling, completions in zip(samplings, served):
            own = colocated.generate(requests, sampling)
            same = [(a, b) for a, b in zip(completions, own) if a.token_ids == b.token_ids]
            assert len(same) >= len(requests) - 1  # what is computed together differs, and with it the rounding
            for a, b in same:
                assert logprob_gap(a.logprobs, b.logprobs) < 1e-4
    finally:
        colocated.close()


@two_vllm
def test_two_ranks_train_through_it(engine, folder, server, tmp_path):
    url, _ = server
    options = ["rollout.mode=server", f"rollout.server_url={url}", "sharding.zero_stage=3"]
    said = train(
        "--config=tiny.yaml",
        f"model.path={folder}",
        f"model.dtype={DTYPE}",
        f"runs={tmp_path}",
        "curriculum.enabled=false",
        "optim.steps=2",
        *options,
        ranks=2,
    )
    assert "weight sync checked" in said
    assert (tmp_path / "tiny" / "final").is_dir()


def test_a_refused_weight_is_not_waited_for(engine, folder, server, model):
    url, _ = server
    engine.close()
    engine = connect(folder, url)
    engine.sync(model.named_parameters())
    wrong = ((name, p[:, :5] if name.endswith("o_proj.weight") else p) for name, p in model.named_parameters())
    with pytest.raises(TrainingError, match=f"the rollout server {url} answered 500 to update_weights .*--resume auto"):
        engine.sync(wrong)


def test_its_death_is_one_line(folder, server, model):
    """Last, as nothing is left after it. Paused since the update before failed, it keeps every request waiting."""
    url, process = server
    engine = connect(folder, url)
    death = threading.Timer(2, os.killpg, (process.pid, signal.SIGKILL))
    death.start()
    with pytest.raises(TrainingError, match=f"the rollout server {url} went away .*--resume auto"):
        engine.generate(REQUESTS, SAMPLING)
    death.join()
    with pytest.raises(TrainingError, match=f"the rollout server {url} does not answer to pause"):
        engine.sync(model.named_parameters())
