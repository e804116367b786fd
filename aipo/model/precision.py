"""``model.dtype: auto`` made into what the hardware multiplies: the one place that chooses."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from aipo.config import Config
from aipo.distributed import refuse_unusable_gpu

# what bfloat16 costs where it does not pay, measured on two cores of each kind
NO_INSTRUCTIONS = (
    "on two such cores a step of `make train` took 200 s in bfloat16 (backward 189) and 26 s in float32 (backward 11)"
)
ONE_PORT = "on two such cores a step of `make train` took 27 s in bfloat16 and 23 s in float32"


@dataclass(frozen=True)
class Precision:
    """A dtype by torch's name, why it is this one, and a warning where another would be several times as fast."""

    dtype: str
    reason: str
    warning: str | None = None

    @property
    def lines(self) -> list[str]:
        """For the user."""
        said = f"model.dtype: {self.dtype} ({self.reason})"
        return [said] if self.warning is None else [said, f"warning: {self.warning}"]

    def settle(self, config: Config) -> Config:
        """The config with this dtype in the place of ``auto``."""
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": self.dtype})})


def this_device() -> str:
    """``cuda`` or ``cpu``: where models run on this machine; UserError where a GPU is there that torch cannot use."""
    if torch.cuda.is_available():
        return "cuda"
    refuse_unusable_gpu()
    return "cpu"


def gains_from_bf16(device: str) -> tuple[bool, str, str]:
    """Whether the hardware multiplies bfloat16 faster than float32, who says so, and what it costs where it does not.

    Asked for ``cuda`` where there is none, it answers for the GPUs that a run is planned for.
    """
    if device == "cpu":
        return _cpu()
    if not torch.cuda.is_available():
        return True, "planned for GPUs, which multiply bfloat16", ""
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    return has, f"{torch.cuda.get_device_name()} {'multiplies' if has else 'does not multiply'} bfloat16", ""


def _cpu() -> tuple[bool, str, str]:
    # Without oneDNN's kernels torch multiplies in scalar loops on one thread. oneDNN says yes to any AVX-512, but
    # without an instruction for it converts to float32 and back: slower than float32, too.
    has = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine() == "x86_64":
        amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        if has and avx512 and not amx and "Intel" in torch.cpu.get_capabilities()["cpu_name"]:
            # One port has the instruction, two multiply float32. Seen on virtual machines that hide AMX.
            return False, "this CPU has bfloat16 in AVX-512 but no AMX, which on Intel is slower than float32", ONE_PORT
        has = has and (amx or avx512)
    return has, f"this CPU has {'' if has else 'no '}instructions for bfloat16", NO_INSTRUCTIONS


def choose(asked: str, device: str, *, begun: str | None = None) -> Precision:
    """The dtype of engine and trainer.

    Args:
        asked: ``model.dtype``, or evaluate.py's ``--dtype``; anything but ``auto`` is taken as it is.
        device: ``cuda`` or ``cpu``.
        begun: dtype of the run that is resumed, which ``auto`` keeps: it goes on as it would have undisturbed.
    """
    gains, said, cost = gains_from_bf16(device)
    if asked != "auto":
        dtype, reason = asked, "as configured"
    elif begun is not None:
        dtype, reason = begun, "auto: as the run began that is resumed"
    else:
        dtype, reason = "bfloat16" if gains else "float32", f"auto: {said}"
    if device == "cpu" and dtype == "bfloat16" and not gains:
        other = "float32 takes a run of its own (name=...)" if begun else "use float32, or auto"
        return Precision(dtype, reason, f"{said}: {cost}; {other}")
    return Precision(dtype, reason)
