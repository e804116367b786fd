"""What a result was measured on, in words that name no host."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def machine() -> str:
    """``2 cores of AMD EPYC``, or ``1 x NVIDIA H200``."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else 'an unknown CPU'}"
