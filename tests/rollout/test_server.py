"""The parts of the server engine that need no vLLM server; tests/e2e/test_rollout_server.py has the rest."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from aipo.config import load_config
from aipo.errors import TrainingError, UserError
from aipo.rollout import server
from aipo.rollout.base import Request, Sampling, Stopped
from aipo.rollout.server import (
    ServerEngine,
    ask,
    background,
    check_server,
    finish,
    own_address,
    parse_completion,
    serve_arguments,
)
from tests.tiny import make_tiny

pytestmark = pytest.mark.slow  # imports vLLM
NAME = "owner/model"


@pytest.fixture
def answers() -> dict[str, object]:
    """What a server started for a context of 100 says, by path."""
    settings = {
        "model_config": {"max_model_len": 100, "logprobs_mode": "processed_logprobs", "dtype": "torch.bfloat16"},
        "weight_transfer_config": {"backend": "gloo"},
    }
    vllm = pytest.importorskip("vllm")
    return {
        "/version": {"version": vllm.__version__},
        "/v1/models": {"data": [{"id": "alias", "root": NAME}]},
        "/server_info?config_format=json": {"vllm_config": settings},
        "/inference/v1/generate": 400,
    }


@pytest.fixture
def url(answers) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path, 404)
            if isinstance(answer, threading.Event):
                answer.wait()
                return
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # else it ends half a second late
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_fit_server_is_accepted(url):
    assert check_server(url, (NAME,), max_model_len=100, dtype="bfloat16") == "gloo"


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/version", {"version": "0.1.0"}, r"runs vLLM 0\.1\.0, the trainer .*install the same"),
        ("/v1/models", {"data": [{"id": "x/y", "root": "x/y"}]}, f"serves x/y, not {NAME}"),
        ("/version", 404, "no vLLM server answers"),
        ("/server_info?config_format=json", 404, "without VLLM_SERVER_DEV_MODE=1"),
        ("dtype", "torch.float32", r"in float32, the trainer in bfloat16: start both with model\.dtype=bfloat16"),
        ("max_model_len", 99, "reads 99 tokens, the run needs 100"),
        ("logprobs_mode", "raw_logprobs", "raw_logprobs, not processed_logprobs"),
        ("weight_transfer_config", None, "no --weight-transfer-config"),
        ("weight_transfer_config", {"backend": "ipc"}, "no --weight-transfer-config of nccl or gloo"),
        ("/inference/v1/generate", 403, "takes no token ids"),
    ],
)
def test_an_unfit_server_is_refused_in_one_line(url, answers, path, answer, words):
    settings = answers["/server_info?config_format=json"]["vllm_config"]
    place = answers if path.startswith("/") else settings if path in settings else settings["model_config"]
    place[path] = answer
    with pytest.raises(UserError, match=words) as error:
        check_server(url, (NAME,), max_model_len=100, dtype="bfloat16")
    assert url in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "words"), [("/version", "no vLLM server answers"), ("/inference/v1/generate", "takes no token ids")]
)
def test_a_server_that_only_listens_is_refused(url, answers, path, words, monkeypatch):
    call = server.call

    def impatient(url, asked, body, *, timeout, **options):
        assert timeout == server.ANSWER_S  # what answers may take its time
        return call(url, asked, body, timeout=0.2 if f"/{asked}" == path else timeout, **options)

    monkeypatch.setattr(server, "call", impatient)
    answers[path] = never = threading.Event()
    try:
        with pytest.raises(UserError, match=words):
            check_server(url, (NAME,), max_model_len=100, dtype="bfloat16")
    finally:
        never.set()


def test_a_dead_server_and_a_refusal_say_what_to_do(url):
    with pytest.raises(TrainingError, match=r"does not answer to pause .*--resume auto"):
        ask("http://127.0.0.1:9", "pause")
    with pytest.raises(TrainingError, match=r"answered 404 to nothing \(404\).*--resume auto"):
        ask(url, "nothing")


def test_own_address(url):
    assert own_address([url, url]) == "127.0.0.1"


def test_the_first_error_is_not_kept_waiting():
    def fail() -> None:
        raise RuntimeError("refused")

    assert background(lambda x: x + 1, 2).result() == 3
    never = threading.Event()
    with pytest.raises(RuntimeError, match="refused"):
        finish([background(never.wait), background(fail)], timeout=60)


LATE = r"{} did not take .* 0\.5 s \(rollout\.server_timeout_s\): "


class Group:
    port = 1

    def __init__(self, address: str, world_size: int) -> None: ...

    def join(self) -> None: ...

    def destroy(self) -> None: ...


@pytest.mark.parametrize(
    ("silent", "answer", "words"),
    [(path, None, LATE) for path in ("pause?mode=wait", "get_world_size", "update_weights", "resume")]
    + [("update_weights", 500, "{} answered 500 to update_weights")],
)
def test_a_server_that_never_answers_or_refuses_ends_a_sync(silent, answer, words, answers, url, monkeypatch, tmp_path):
    """Asked to pause, for its workers, to take a bucket, or to go on. A broadcast then waits for it, until the group is
    destroyed."""
    monkeypatch.setattr("aipo.rollout.server.check_server", lambda *a, **k: "gloo")
    never, freed = threading.Event(), threading.Event()

    class Silent(Group):
        def broadcast(self, tensors: list[torch.Tensor]) -> None:
            if silent == "update_weights":
                freed.wait()

        def destroy(self) -> None:
            freed.set()

    paths = ["pause?mode=wait", "shutdown_weight_transfer_engine", "get_world_size", "init_weight_transfer_engine"]
    paths += ["start_weight_update", "update_weights", "finish_weight_update", "resume"]
    answers |= {f"/{path}": {"world_size": 1} for path in paths}
    answers[f"/{silent}"] = answer or never
    monkeypatch.setattr("aipo.rollout.transfer.GROUPS", {"gloo": Silent})
    folder = str(make_tiny(tmp_path / "model"))
    engine = ServerEngine(folder, urls=[url], max_model_len=100, end_token_ids=[2], timeout=0.5)
    weights = list(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    try:
        with pytest.raises(TrainingError, match=words.format(url)):
            engine.sync(weights)
        assert silent != "update_weights" or freed.wait(60)
    finally:
        never.set()
        freed.set()


@pytest.mark.parametrize("given_up", [False, True])
def test_a_draw_ends_with_a_server_that_falls_silent_or_when_it_is_given_up(
    given_up, answers, url, monkeypatch, tmp_path
):
    monkeypatch.setattr("aipo.rollout.server.check_server", lambda *a, **k: "gloo")
    monkeypatch.setattr("aipo.rollout.server.WATCH_S", 1 if given_up else 0)
    monkeypatch.setattr("aipo.rollout.server.ANSWER_S", 0.2)
    never = threading.Event()
    answers |= {"/inference/v1/generate": never} | ({} if given_up else {"/health": never})
    engine = ServerEngine(
        str(make_tiny(tmp_path / "model")), urls=[url], max_model_len=100, end_token_ids=[2], timeout=1
    )
    if given_up:
        engine.stopped.set()
    error, words = (
        (Stopped, None) if given_up else (TrainingError, f"{url} does not answer any more: read the server's log")
    )
    try:
        with pytest.raises(error, match=words):
            engine.generate([Request([3, 4], seed=0)], Sampling(max_tokens=4))
    finally:
        never.set()


def response(**choice: object) -> dict[str, object]:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 2, "logprob": -1.25}]
    usual = {"token_ids": [7, 2], "finish_reason": "stop", "logprobs": {"content": content}}
    return {"choices": [usual | choice]}


def test_parse_completion():
    completion = parse_completion(response())
    assert (completion.token_ids, completion.logprobs, completion.finish_reason) == ([7, 2], [-0.5, -1.25], "stop")
    with pytest.raises(RuntimeError, match="abort"):
        parse_completion(response(finish_reason="abort"))
    with pytest.raises(RuntimeError, match="another number"):
        parse_completion(response(token_ids=[7]))


def test_serve_arguments():
    config = load_config("tiny.yaml", ["model.path=owner/model"])
    cpu = serve_arguments(config, "/folder", gpu=False)
    gpu = serve_arguments(config, "/folder", gpu=True)
    context = config.data.max_prompt_tokens + config.rollout.max_tokens
    for arguments in (cpu, gpu):
        assert "--model=/folder" in arguments
        assert "--served-model-name=owner/model" in arguments
        assert f"--max-model-len={context}" in arguments
    assert '--weight-transfer-config={"backend": "gloo"}' in cpu
    assert '--weight-transfer-config={"backend": "nccl"}' in gpu
    assert not any("kv-cache" in argument or "eager" in argument for argument in gpu)


def test_config_keys():
    config = load_config(
        "tiny.yaml", ["model.path=x/y", "rollout.mode=server", "rollout.server_url=[http://a, http://b]"]
    )
    assert config.rollout.server_url == ("http://a", "http://b")
    with pytest.raises(UserError, match=r"rollout\.mode: server asks vLLM servers"):
        load_config("tiny.yaml", ["model.path=x/y", "rollout.mode=server", "rollout.engine=hf"])
