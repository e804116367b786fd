"""Plain Hugging Face generation behind the engine interface, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aipo.config.sections import RolloutConfig
from aipo.model.loading import attention_widths
from aipo.rollout.base import Completion, OnDone, Request, Sampling, Stopped, check_complete, check_requests, keep_rng
from aipo.rollout.decoding import GROUPED, Fixed, Growing, fits, forward
from aipo.rollout.injection import Injection
from aipo.rollout.interventions import intervene


def rows_together(longest: int, cached: int | None = None) -> int:
    """Sequences, of at most ``longest`` tokens with their prompts, that the engine generates at a time: 64, and more
    while the cache is short, since a step of a small model costs nearly the same for few rows and for many; but no
    more than a cache of ``cached`` tokens holds, though at least one."""
    most = min(256, max(64, 2**15 // longest))
    return most if cached is None else max(1, min(most, cached // longest))


class HfEngine:
    """Batched sampling with a KV cache; what a request draws depends on its seed and its distributions alone.

    Args:
        model_path: Hugging Face folder.
        max_model_len: longest prompt plus completion, in tokens.
        end_token_ids: tokens that end a completion.
        seed: of the random weights when ``load_weights`` is ``False``.
        batch_size: requests generated together; None: :func:`rows_together`.
        gpu_memory_utilization: share of the GPU for weights and KV cache; without effect on CPU.
        interventions: whether ``Sampling.intervention`` may be used, as in the vLLM engine.
        fixed_cache: whether the KV cache has a fixed size (:mod:`aipo.rollout.decoding`); None does so on a GPU.
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
        batch_size: int | None = None,
        gpu_memory_utilization: float = RolloutConfig().gpu_memory_utilization,
        interventions: bool = False,
        fixed_cache: bool | None = None,
    ) -> None:
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        model: Any  # transformers' wrapper of `.to` has no usable type
        if load_weights:
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
        else:
            config = AutoConfig.from_pretrained(model_path)
            with keep_rng(), self._device:  # one core takes a minute for a billion of them
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()
        if model.config._attn_implementation == "sdpa":
            self._model.set_attn_implementation(GROUPED)
        self._max_model_len, self._interventions = max_model_len, interventions
        cached = None
        if self._device.type == "cuda":
            share = int(gpu_memory_utilization * torch.cuda.get_device_properties(self._device).total_memory)
            text = model.config.get_text_config()
            token = kv_token_bytes(text.num_hidden_layers, attention_widths(text)[1], self._model.dtype.itemsize)
            cached = (share - self._model.get_memory_footprint()) // token
        self._batch_size = batch_size or rows_together(max_model_len, cached)
        self._end_token_ids = frozenset(end_token_ids)
        wanted = self._device.type == "cuda" if fixed_cache is None else fixed_cache
        self._fixed_cache = wanted and fits(model.config)
        self.asleep, self._released = False, list[tuple[torch.UntypedStorage, int]]()
        self.stopped = Event()

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        on_done: OnDone = None,
        injection: Injection | None = None,
    ) -> list[Completion]:
        """See :meth:`~aipo.rollout.base.RolloutEngine.generate`.

        ``injection`` holds a latent for each request. Their log-probabilities are those of the changed model. One that
        changes nothing (a zero latent or scale) draws exactly what it would without. Raises ``ValueError`` if it has
        another number of rows, or for a prompt of one token: nothing could be read before the latent acts.
        """
        if self.asleep:
            raise RuntimeError("the engine sleeps: sync weights before generating")
        check_requests(requests, sampling, max_model_len=self._max_model_len, interventions=self._interventions)
        if injection is not None:
            if len(injection.z) != len(requests):
                raise ValueError(f"{len(injection.z)} latents for {len(requests)} requests")
            if any(len(request.prompt_ids) < 2 for request in requests):
                raise ValueError("a latent needs a prompt of two tokens or more")
        done: dict[int, Completion] = {}

        def finish(i: int, completion: Completion) -> None:
            done[i] = completion
            if on_done is not None:
                on_done(i, completion)

        # Prompts of like length share a batch, so little is padded.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        changed = [i for i in order if injection is not None and injection.acts_on(i)]
        plain = [i for i in order if injection is None or not injection.acts_on(i)]
        for rows, latents in ((plain, None), (changed, injection)):
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                own = None if latents is None else latents.rows(torch.tensor(batch)).to(self._device)
                self._generate_batch([(i, requests[i]) for i in batch], sampling, finish, own)
        return [done[i] for i in range(len(requests))]

    @torch.no_grad()
    def _generate_batch(
        self,
        batch: list[tuple[int, Request]],
        sampling: Sampling,
        finish: Callable[[int, Completion], None],
        injection: Injection | None,
    ) -> None:
        prompts = sorted({tuple(request.prompt_ids) for _, request in batch})  # each prefilled once
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._device)  # (P, S)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)  # (P, S)
        cache = DynamicCache(config=self._model.config)
        rows = torch.tensor([prompts.index(tuple(request.prompt_ids)) for _, request in batch], device=self._device)
        if injection is None:
            logits = forward(self._model, ids, mask, cache)[rows]  # (B, V)
            cache.batch_select_indices(rows)
        else:  # latents act from the last token of the prompt on; what stands before it is read once for all
            forward(self._model, ids[:, :-1], mask[:, :-1], cache)
            cache.batch_select_indices(rows)
            injection.prepend(cache)
            logits = forward(self._model, ids[rows, -1:], mask[rows], cache, injection)  # (B, V)
        live = [
            _Draw(i, request.max_tokens or sampling.max_tokens, torch.Generator().manual_seed(request.seed))
            for i, request in batch
        ]
        decoding: Fixed | Growing
        if self._fixed_cache and injection is None:
            decoding = Fixed(self._model, cache, mask[rows], most=width + max(d.max_tokens for d in live))
        else:
            decoding = Growing(self._model, cache, mask[rows], injection)
        while True:
            if self.stopped.is_set():
                raise Stopped
            tokens, logprobs = draw(logits, sampling, [d.generator for d in live])  # (B,), (B,)
            unfinished = []
            for row, (d, token, logprob) in enumerate(zip(live, tokens.tolist(), logprobs.tolist(), strict=True)):
                d.token_ids.append(token)
                d.logprobs.append(logprob)
                stopped = token in self._end_token_ids
                if stopped or len(d.token_ids) == d.max_tokens:
                    finish(d.index, Completion(d.token_ids, d.logprobs, "stop" if stopped else "length"))
                else:
                    unfinished.append(row)
            if not unfinished:
                return
            if len(unfinished) < len(live):
                live = [live[row] for row in unfinished]
                rows = torch.tensor(unfinished, device=self._device)
                tokens = tokens[rows]
                decoding.keep(rows)
            logits = decoding.step(tokens)  # (B, V)

    @torch.no_grad()
    def mean_states(self, sequences: Sequence[Sequence[int]], cuts: Sequence[int]) -> Tensor:
        """Mean last-layer state (behind the final norm) of the tokens before and from ``cuts[i]``; 0 where there are
        none. Nothing of a sequence is seen by the tokens before it, so the first half is the prefix's own.

        Returns:
            (B, 2, d) in float32, on CPU, where the latents are drawn.
        """
        if self.asleep:
            raise RuntimeError("the engine sleeps: sync weights before reading states")
        means = torch.zeros(len(sequences), 2, self._model.config.hidden_size, device=self._device)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            lengths = torch.tensor([len(sequences[i]) for i in rows], device=self._device)[:, None]  # (b, 1)
            before = torch.tensor([cuts[i] for i in rows], device=self._device)[:, None]  # (b, 1)
            width = int(lengths.max())
            ids = torch.tensor([[*sequences[i]] + [0] * (width - len(sequences[i])) for i in rows])  # (b, S)
            at = torch.arange(width, device=self._device)[None]  # (1, S)
            token = at < lengths  # (b, S)
            states = self._model.base_model(
                input_ids=ids.to(self._device), attention_mask=token.long(), use_cache=False
            ).last_hidden_state.float()  # (b, S, d)
            for half, span in enumerate((token & (at < before), token & (at >= before))):
                weight = span / span.sum(dim=1, keepdim=True).clamp(min=1)  # (b, S)
                means[rows, half] = torch.einsum("bs,bsd->bd", weight, states)
        return means.cpu()

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See :meth:`~aipo.rollout.base.RolloutEngine.sync`; copies in place."""
        for storage, size in self._released:
            storage.resize_(size)
        own = self._model.state_dict()  # a tied head appears under both names, as one tensor
        names = set()
        for name, tensor in weights:
            own[name].copy_(tensor.detach())
            names.add(name)
        check_complete(names, (name for name, _ in self._model.named_parameters()))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # another thread may draw next, on a stream of its own
        self.asleep, self._released = False, []

    def sleep(self) -> None:
        """Give the memory of the weights back to the GPU until the next ``sync`` brings them; nothing on CPU."""
        if self._device.type == "cpu" or self.asleep:
            return
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in self._model.parameters()}
        self._released = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in self._released:
            storage.resize_(0)
        self.asleep = True

    def close(self) -> None:
        """Free the model."""
        del self._model


def kv_token_bytes(layers: int, width: int, size: int) -> int:
    """Keys and values of one token, ``width`` numbers each of ``size`` bytes, in all layers."""
    return 2 * layers * width * size


@dataclass
class _Draw:
    index: int
    max_tokens: int
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the distribution function at one uniform number from the row's generator.

    Args:
        logits: (B, V).
        generators: B of them, on CPU, so that a seed means the same on every device.

    Returns:
        tokens (B,) and their log-probabilities (B,), in float32, after intervention, temperature, min-p, top-k and
        top-p in this order, which is vLLM's.
    """
    logits = logits.float()
    if sampling.intervention is not None:
        logits = intervene(logits, [sampling.intervention] * len(logits))
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.min_p > 0:
            warpers.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        for warp in warpers:
            logits = warp(None, logits)
        cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
        uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # (B,)
        below = uniform.to(cdf.device)[:, None] * cdf[:, -1:]  # (B, 1)
        tokens = torch.searchsorted(cdf, below, right=True).squeeze(1)  # the first whose cdf exceeds it
    return tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
