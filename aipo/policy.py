"""The policy: a causal LM in ONE module whose forward does everything that ZeRO-3 must see.

ZeRO-3 gathers a weight when the module that owns it is called, on all ranks together. So the number of calls must
not depend on a rank's data: the head is called exactly once where logits are asked for, with however many positions
were selected (none is fine), and cuts them into chunks *inside* that call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aipo.config import Config
from aipo.layout import MicroBatch
from aipo.mi import CACHE_ELEMENTS, tokens_that_fit
from aipo.model.adapters import add_adapters
from aipo.model.loading import load_model
from aipo.model.shared_attention import NAME as SHARED

Select = Callable[[Tensor], Tensor]
"""(N, d) states that predict the N completion tokens -> (N,) bool, the tokens whose log-probability is needed"""


class Policy(nn.Module):
    """Hidden states, selected log-probabilities and entropies of completion tokens.

    Args:
        model: a transformers causal LM with a decoder of ``layers`` and a linear head.
        temperature: logits are divided by it, as in the sampling that they are compared with.
        layer: decoder layer whose output (raw residual stream, before the final norm) is the hidden state.
        head_chunk: positions whose logits exist at one time.
        entropy_gradient: whether the loss differentiates the entropy, which costs a little in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        layer: int = -1,
        head_chunk: int = 1024,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        if model.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
            model.set_attn_implementation(SHARED)  # type: ignore[operator]  # the same but for rows of several sequences
        self.temperature = temperature
        self.head_chunk = head_chunk
        self.entropy_gradient = entropy_gradient
        layers = self.model.base_model.layers  # type: ignore[union-attr]
        self.probed_layer: nn.Module = layers[layer]  # type: ignore[index, assignment]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        head.forward = MethodType(_head_forward, head)  # its ZeRO-3 hooks and its name in the checkpoint stay

    def forward(self, micro: MicroBatch, select: Select | None = None, *, full: bool = False) -> dict[str, Tensor]:
        """One pass over ``micro``.

        Returns:
            Without ``select``: ``states`` (N, d), detached, and with ``full`` what the whole vocabulary says at all N
            tokens, without gradient: the numbers (N,) of :func:`vocabulary_statistics`.
            With ``select``: ``mask`` (N,) bool as selected and, for its K true positions, ``logp`` (K,) with gradient
            and ``entropy`` (K,), with gradient if ``entropy_gradient``; with ``full`` those numbers (K,) instead. All
            float32, in nats and after temperature.
        """
        mask, by_tree = micro.attention_mask, {}
        if micro.tree is not None and self.model.config._attn_implementation == SHARED:  # type: ignore[union-attr]
            # 4-d, so that transformers makes none of (s, s); empty, so that what looked at it would fail
            mask, by_tree = micro.input_ids.new_empty(1, 1, 0, 0), {"tree": micro.tree}
        captured: list[Tensor] = []
        # only for this forward: gradient checkpointing runs the layer again in the backward pass
        hook = self.probed_layer.register_forward_hook(lambda _m, _i, output: captured.append(_first(output).detach()))
        try:
            last = self.model.base_model(  # type: ignore[operator]
                input_ids=micro.input_ids,
                attention_mask=mask,
                position_ids=micro.position_ids,
                use_cache=False,
                **by_tree,
            ).last_hidden_state  # (r, s, d)
        finally:
            hook.remove()
        states = captured[0].flatten(0, 1)[micro.predictors]  # (N, d)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        settings = {"temperature": self.temperature, "chunk": self.head_chunk}
        if full and select is None:
            with torch.no_grad():
                statistics = head(last.flatten(0, 1)[micro.predictors], micro.targets, full=True, **settings)
            return {"states": states} | statistics
        if select is None:
            return {"states": states}
        with torch.no_grad():
            mask = select(states)  # (N,)
            if full:
                hidden = last.flatten(0, 1)[micro.predictors[mask]]  # (K, d)
                return {"mask": mask} | head(hidden, micro.targets[mask], full=True, **settings)
        hidden = last.flatten(0, 1)[micro.predictors[mask]]  # (K, d)
        logp, entropy = head(hidden, micro.targets[mask], entropy_gradient=self.entropy_gradient, **settings)
        return {"mask": mask, "logp": logp, "entropy": entropy}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _head_forward(
    self: nn.Linear,
    hidden: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float | None = None,
    chunk: int = 1024,
    entropy_gradient: bool = False,
    full: bool = False,
) -> Any:
    """The plain linear head; or, never holding all logits, the log-probabilities of ``targets`` and the entropy, or
    with ``full`` the numbers of :func:`vocabulary_statistics`."""
    if temperature is None or targets is None:
        return F.linear(hidden, self.weight, self.bias)
    if full:
        return vocabulary_statistics(hidden, self.weight, self.bias, targets, temperature, chunk)
    return SelectedLogProbs.apply(hidden, self.weight, self.bias, targets, temperature, chunk, entropy_gradient)


def vocabulary_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int
) -> dict[str, Tensor]:
    """(N, d), (V, d), (V,) or None, (N,) -> numbers (N,) of p = softmax(h W^T / temperature), in nats.

    ``entropy``; ``certainty`` (INTUITOR), KL(uniform || p) = -1/V sum_j log(V p_j) = logsumexp(z) - mean(z) - log V;
    ``energy`` (the optimal token baseline, arXiv 2602.07078), the squared norm of d log p_target / dz, without its
    temperature: |e_target - p|^2 = 1 - 2 p_target + sum_j p_j^2; ``logp`` and ``largest``, log p of the target and of
    the likeliest token; ``gap``, log p of the likeliest token less that of the next, 0 where two are equally likely.
    """
    entropy = hidden.new_empty(len(hidden), dtype=torch.float32)  # (N,)
    certainty, energy, logp, largest, gap = (torch.empty_like(entropy) for _ in range(5))  # (N,) each
    weight = _as_computed(weight)
    for part in _parts(len(hidden), chunk):
        product = F.linear(hidden[part], weight, bias)  # (chunk, V)
        for rows, here in _blocks(product, part.start):
            log_p = product[rows].float().div_(temperature).log_softmax(-1)  # (rows, V)
            logp[here] = log_p.gather(-1, targets[here, None])[:, 0]
            certainty[here] = -log_p.mean(-1) - math.log(log_p.shape[-1])
            p = log_p.exp()  # (rows, V)
            drawn = p.gather(-1, targets[here, None])[:, 0]  # (rows,)
            energy[here] = (1 - 2 * drawn + torch.linalg.vector_norm(p, dim=-1).square()).clamp(min=0)
            entropy[here] = -p.mul_(log_p).sum(-1)
            first, where = log_p.max(-1, keepdim=True)  # (rows, 1); twice the largest is cheaper than the two at once
            largest[here] = first[:, 0]
            gap[here] = first[:, 0] - log_p.scatter_(-1, where, -torch.inf).amax(-1)
    numbers = {"entropy": entropy, "certainty": certainty, "energy": energy, "logp": logp}
    return numbers | {"largest": largest, "gap": gap}


class SelectedLogProbs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target] and its entropy, chunk by chunk, logits recomputed in backward.

    Shapes: hidden (K, d), weight (V, d), bias (V,) or None, targets (K,) -> logp (K,), entropy (K,), float32.
    At most (chunk, V) logits exist at a time, in the precision of the product, and float32 copies of a block of them.
    The entropy carries a gradient only if asked to.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk, entropy_gradient):
        logp = hidden.new_empty(len(targets), dtype=torch.float32)  # (K,)
        entropy = torch.empty_like(logp)  # (K,)
        computed = _as_computed(weight)
        for part in _parts(len(targets), chunk):
            product = F.linear(hidden[part], computed, bias)  # (chunk, V)
            for rows, here in _blocks(product, part.start):
                log_p = product[rows].float().div_(temperature).log_softmax(-1)  # (rows, V)
                logp[here] = log_p.gather(-1, targets[here, None])[:, 0]
                entropy[here] = -log_p.exp().mul_(log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.chunk, ctx.entropy_gradient = temperature, chunk, entropy_gradient
        device = hidden.device.type
        ctx.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)  # (K, d)
        grad_weight = None  # (V, d); a frozen head needs none
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with ctx.autocast:  # else what is recomputed would be of another precision, and slow
            computed = _as_computed(weight)
            for part in _parts(len(targets), ctx.chunk):
                product = F.linear(hidden[part], computed, bias)  # (chunk, V), which its gradient then takes over
                for rows, here in _blocks(product, part.start):
                    by_entropy = grad_entropy[here] if ctx.entropy_gradient else None
                    grad = _logits_gradient(product[rows], targets[here], grad_logp[here], by_entropy, ctx.temperature)
                    if grad_bias is not None:
                        grad_bias += grad.sum(0)
                    product[rows] = grad
                    del grad  # before the next is made
                grad_hidden[part] = product @ computed
                if ctx.needs_input_grad[1]:
                    of_part = product.T @ hidden[part]  # (V, d)
                    grad_weight = of_part.float() if grad_weight is None else grad_weight.add_(of_part)
                    del of_part
                del product
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits_gradient(
    product: Tensor, targets: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None, temperature: float
) -> Tensor:
    """Gradient of log-probabilities (n,) and, unless None, entropies (n,) by the logits (n, V), before temperature."""
    logits = product.float().div_(temperature)  # (n, V)
    # d logp / d logits = (onehot - softmax) / temperature
    grad = logits.softmax(-1).neg_()  # (n, V)
    by_entropy = None
    if grad_entropy is not None:  # d entropy / d logits = -p (log p + entropy) / temperature
        log_p = logits.log_softmax(-1)  # (n, V)
        entropy = (grad * log_p).sum(-1, keepdim=True)  # (n, 1)
        by_entropy = grad * (log_p + entropy) * (grad_entropy[:, None] / temperature)  # (n, V)
    grad.scatter_add_(-1, targets[:, None], torch.ones_like(grad[:, :1]))
    grad.mul_(grad_logp[:, None] / temperature)
    return grad if by_entropy is None else grad.add_(by_entropy)


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]


def _blocks(product: Tensor, start: int) -> Iterator[tuple[slice, slice]]:
    """Rows of (chunk, V) whose passes over the vocabulary stay in a CPU's cache, all of them on a GPU; and where they
    are among all positions, the chunk beginning at ``start``."""
    fitting = len(product) if product.is_cuda else tokens_that_fit(product.shape[1], CACHE_ELEMENTS)
    for rows in _parts(len(product), fitting):
        yield rows, slice(start + rows.start, start + rows.stop)


def _as_computed(weight: Tensor) -> Tensor:
    """In the precision of products, so that autocast does not convert it for each of them."""
    device = weight.device.type
    return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight


def make_policy(config: Config, path: str, *, trained: bool = True) -> Policy:
    """The model in its wrapper; with adapters if they are ``trained``."""
    model = load_model(
        path,
        dtype=getattr(torch, config.model.dtype),
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    if config.lora.rank and trained:
        lora = config.lora
        add_adapters(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
    return Policy(
        model,
        temperature=config.rollout.temperature,
        layer=config.mi.layer,
        head_chunk=config.model.head_chunk,
        entropy_gradient=config.loss.entropy_weight > 0,
    )
