"""Plain Hugging Face generation behind the engine interface, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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

from aipo.rollout.base import Completion, Request, Sampling, check_complete, check_lengths, keep_rng


class HfEngine:
    """Batched sampling with a KV cache; what a request draws depends on its seed and its distributions alone.

    Args:
        model_path: Hugging Face folder.
        max_model_len: longest prompt plus completion, in tokens.
        end_token_ids: tokens that end a completion.
        seed: of the random weights when ``load_weights`` is ``False``.
        batch_size: requests generated together.
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
        batch_size: int = 64,
    ) -> None:
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        model: Any  # transformers' wrapper of `.to` has no usable type
        if load_weights:
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
        else:
            config = AutoConfig.from_pretrained(model_path)
            with keep_rng():
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()
        self._max_model_len, self._batch_size = max_model_len, batch_size
        self._end_token_ids = frozenset(end_token_ids)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """See :meth:`~aipo.rollout.base.RolloutEngine.generate`."""
        check_lengths(requests, sampling, self._max_model_len)
        done: dict[int, Completion] = {}

        def finish(i: int, completion: Completion) -> None:
            done[i] = completion
            if on_done is not None:
                on_done(i, completion)

        # Prompts of like length share a batch, so little is padded.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            self._generate_batch([(i, requests[i]) for i in batch], sampling, finish)
        return [done[i] for i in range(len(requests))]

    @torch.no_grad()
    def _generate_batch(
        self, batch: list[tuple[int, Request]], sampling: Sampling, finish: Callable[[int, Completion], None]
    ) -> None:
        prompts = sorted({tuple(request.prompt_ids) for _, request in batch})  # each prefilled once
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._device)  # (P, S)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)  # (P, S)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, cache)  # (P, V)

        rows = torch.tensor([prompts.index(tuple(request.prompt_ids)) for _, request in batch], device=self._device)
        logits, mask = logits[rows], mask[rows]  # (B, V), (B, S)
        cache.batch_select_indices(rows)
        live = [_Draw(i, torch.Generator().manual_seed(request.seed)) for i, request in batch]
        while True:
            tokens, logprobs = draw(logits, sampling, [d.generator for d in live])  # (B,), (B,)
            unfinished = []
            for row, (d, token, logprob) in enumerate(zip(live, tokens.tolist(), logprobs.tolist(), strict=True)):
                d.token_ids.append(token)
                d.logprobs.append(logprob)
                stopped = token in self._end_token_ids
                if stopped or len(d.token_ids) == sampling.max_tokens:
                    finish(d.index, Completion(d.token_ids, d.logprobs, "stop" if stopped else "length"))
                else:
                    unfinished.append(row)
            if not unfinished:
                return
            if len(unfinished) < len(live):
                live = [live[row] for row in unfinished]
                rows = torch.tensor(unfinished, device=self._device)
                tokens, mask = tokens[rows], mask[rows]
                cache.batch_select_indices(rows)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (B, S + 1)
            logits = self._forward(tokens[:, None], mask, cache)  # (B, V)

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits after the last of the new ``ids``; ``mask`` covers the cached tokens too."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (B, new)
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        return output.logits[:, -1]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See :meth:`~aipo.rollout.base.RolloutEngine.sync`; copies in place."""
        self._model.to(self._device)
        own = self._model.state_dict()  # a tied head appears under both names, as one tensor
        names = set()
        for name, tensor in weights:
            own[name].copy_(tensor.detach())
            names.add(name)
        check_complete(names, (name for name, _ in self._model.named_parameters()))

    def sleep(self) -> None:
        """Move the weights to main memory; nothing on CPU."""
        self._model.to("cpu")

    def close(self) -> None:
        """Free the model."""
        del self._model


@dataclass
class _Draw:
    index: int
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the distribution function at one uniform number from the row's generator.

    Args:
        logits: (B, V).
        generators: B of them, on CPU, so that a seed means the same on every device.

    Returns:
        tokens (B,) and their log-probabilities (B,), in float32, after temperature, min-p, top-k and top-p in
        this order, which is vLLM's.
    """
    logits = logits.float()
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
