"""Weights, gradients and optimizer over ranks: DeepSpeed (ZeRO 1-3) or plain PyTorch (0), behind the same few calls.

Losses come in unnormalised and their denominator is known only after the last micro-batch (the mask is decided
inside the forward). So gradients are accumulated as sums and :meth:`step` divides them, clips them and updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aipo import distributed
from aipo.config import Config
from aipo.layout import MicroBatch
from aipo.model.adapters import alpha_of, merge, originals
from aipo.policy import Policy, make_policy

GATHERED = 2**24
"""Elements of weights that are gathered together for the rollout engine: a gathering costs up to a millisecond."""


class Sharded(ABC):
    """A policy with its optimizer. All methods are collective: every rank calls them equally often."""

    policy: Policy

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """:meth:`Policy.forward`."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a sum () to what :meth:`step` will use."""

    @abstractmethod
    def step(self, denominator: float, lr: float) -> float:
        """Divide the gradient summed over micro-batches and ranks by ``denominator``, clip its norm, update.

        Returns:
            The gradient norm before clipping; not finite if the gradient was not, and then nothing was updated.
        """

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor), the same until the next optimizer step. Consume it fully on every rank.

        Tied ones come once; adapters come merged into the weights that they belong to.
        """
        alpha = alpha_of(self.policy.model)
        weights = originals(dict(self.names()))
        for together in distributed.buckets(weights, GATHERED, lambda weight: whole_size(weight[1])):
            with self.gathered([part for _, parts in together for part in parts]):
                for name, parts in together:
                    yield name, merge(parts, alpha)

    def gathered(self, parts: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Within it these parameters are whole on every rank."""
        return nullcontext()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer."""

    @abstractmethod
    def load(self, folder: Path) -> None: ...

    def poison(self, loss: Tensor) -> Tensor:
        """A non-finite loss with a gradient that is surely non-finite too, so that all ranks skip the step."""
        return loss if torch.isfinite(loss) else loss * float("nan")

    def names(self) -> list[tuple[str, torch.nn.Parameter]]:
        """All parameters as the model names them: those of adapters too, tied ones once."""
        return list(self.policy.model.named_parameters())


class DeepSpeed(Sharded):
    def __init__(self, policy: Policy, config: Config, device: torch.device) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        # The dict that DeepSpeed asks whether its shared-memory all-reduce can be compiled, and then compiles it, for
        # inference that nothing here does. AdamW is torch's, offloaded too, so no other op is ever compiled.
        deepspeed.ops.__compatible_ops__ = {}
        self.policy = policy
        self.stage = config.sharding.zero_stage
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=make_optimizer(policy, config, device),
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        # a script that DeepSpeed copies beside each checkpoint, by rank 0 between two barriers: not on a full disk
        self.engine._copy_recovery_script = lambda _folder: None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._divide_by(1.0)
        self.engine.backward(self.poison(loss))

    def step(self, denominator: float, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._divide_by(denominator / distributed.world_size())  # DeepSpeed averages over ranks
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _divide_by(self, scale: float) -> None:
        """Of the gradient: what DeepSpeed calls the loss scale multiplies the loss and divides the gradient."""
        if hasattr(self.optimizer, "override_loss_scale"):
            self.optimizer.override_loss_scale(scale)
        elif scale != 1:  # ZeRO-1 in bfloat16 has no loss scale
            for gradient in self.optimizer.get_grads_for_norm(for_clipping=True):
                gradient.div_(scale)

    def gathered(self, parts: Sequence[Tensor]) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return super().gathered(parts)
        import deepspeed

        # A pass without the backward one that DeepSpeed has recorded, as the engine's check makes, leaves weights on
        # their way, fetched ahead for that. The next pass waits for them; gathering asserts that there are none.
        self.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        return deepspeed.zero.GatheredParameters(parts)

    def save(self, folder: Path) -> None:
        # DeepSpeed waits for all ranks after writing: a rank whose disk is full must get there before it complains
        writer, failures = self.engine.checkpoint_engine, []
        write = writer.save

        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        writer.save = attempt
        try:
            self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        finally:
            writer.save = write
        if failures:
            raise failures[0]

    def load(self, folder: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not load {folder}")


class Plain(Sharded):
    """Data parallelism by hand: every rank holds everything, float32 weights, autocast where config says bfloat16."""

    def __init__(self, policy: Policy, config: Config, device: torch.device) -> None:
        self.policy = policy.float().to(device)
        self.optimizer = make_optimizer(policy, config, device)
        self.max_norm = config.optim.max_grad_norm
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.model.bfloat16)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with self.autocast:
            return self.policy(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.poison(loss).backward()

    def step(self, denominator: float, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parameters = trainable(self.policy)
        for parameter in parameters:
            if parameter.grad is None:  # on no rank may a parameter be left out of the reduction
                parameter.grad = torch.zeros_like(parameter)
            if distributed.world_size() > 1:
                dist.all_reduce(parameter.grad)
            parameter.grad.div_(denominator)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm))
        if torch.isfinite(torch.tensor(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        if distributed.rank() == 0:
            torch.save(
                {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "plain.pt"
            )

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "plain.pt", map_location="cpu", weights_only=True)
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])


def trainable(policy: Policy) -> list[torch.nn.Parameter]:
    """All parameters or, of a model with adapters, those."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def make_optimizer(policy: Policy, config: Config, device: torch.device) -> torch.optim.AdamW:
    optim = config.optim
    return torch.optim.AdamW(
        trainable(policy), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def whole_size(parts: Sequence[Tensor]) -> int:
    """Elements of parameters when they are gathered; of a shard ZeRO-3 knows the whole."""
    return sum(getattr(part, "ds_numel", part.numel()) for part in parts)


def learning_rate(step: int, config: Config) -> float:
    """Of step 0, 1, ...: linear warm-up, then constant, or linear or cosine down to 0 after the last step."""
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / (optim.steps - optim.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()),
    }
    return optim.lr * factor[optim.schedule]


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration; the optimizer, the schedule and the micro-batches are ours."""
    sharding = config.sharding
    zero: dict[str, Any] = {"stage": sharding.zero_stage}
    if sharding.zero_stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": False}
    if sharding.offload_optimizer:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step has as many backward passes as come before step()
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": config.model.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},  # sums over micro-batches; those over ranks are made in model.dtype
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def shard(policy: Policy, config: Config, device: torch.device) -> Sharded:
    return (DeepSpeed if config.sharding.zero_stage > 0 else Plain)(policy, config, device)


Reference = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]]
"""micro-batch, mask (N,) -> log-probabilities (K,) of the initial model and how unsure it is (K,), nats"""


def frozen_reference(config: Config, path: str, device: torch.device) -> Reference:
    """Log-probabilities of the initial model at a given mask, and how unsure it is there: its entropy, or with
    ``loss.kl_certainty: largest`` minus the log of its largest probability. Sharded as the policy is under ZeRO-3."""
    policy = make_policy(config, path, trained=False).eval().requires_grad_(False)
    by_largest = config.loss.kl_certainty == "largest"
    if config.sharding.zero_stage == 3:
        import deepspeed

        settings = deepspeed_config(config)
        settings["zero_optimization"] = {"stage": 3}
        forward, *_ = deepspeed.initialize(model=policy, config=settings, dist_init_required=False)
    else:
        forward = policy.to(device)

    @torch.no_grad()
    def reference(micro: MicroBatch, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(micro, lambda _: mask, full=by_largest)
        return out["logp"], -out["largest"] if by_largest else out["entropy"]  # (K,), (K,)

    return reference
