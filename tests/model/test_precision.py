"""The dtype that auto stands for, on machines that this one is made to look like."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from aipo.config import load_config
from aipo.model.precision import choose


@pytest.fixture
def look_like(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def change(
        *, onednn: bool, instructions: bool, amx: bool = False, cpu: str = "AMD Zen 4", machine: str = "x86_64"
    ) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu})
        monkeypatch.setattr(platform, "machine", lambda: machine)

    return change


@pytest.mark.parametrize(
    ("onednn", "instructions", "machine", "dtype"),
    [
        (True, True, "x86_64", "bfloat16"),
        (True, False, "x86_64", "float32"),  # AVX-512 without BF16: oneDNN converts
        (False, True, "x86_64", "float32"),  # oneDNN was told to leave them alone
        (True, False, "aarch64", "bfloat16"),
    ],
)
def test_auto_is_what_the_cpu_multiplies(  # type: ignore[no-untyped-def]
    onednn: bool, instructions: bool, machine: str, dtype: str, look_like
) -> None:
    look_like(onednn=onednn, instructions=instructions, machine=machine)
    chosen = choose("auto", "cpu")
    assert (chosen.dtype, chosen.warning) == (dtype, None)
    assert chosen.lines == [f"model.dtype: {dtype} ({chosen.reason})"]


@pytest.mark.parametrize(
    ("cpu", "amx", "dtype"),
    [("Intel Xeon", True, "bfloat16"), ("Intel Xeon", False, "float32"), ("AMD Zen 4", False, "bfloat16")],
)
def test_avx512_alone_gains_nothing_on_intel(cpu: str, amx: bool, dtype: str, look_like) -> None:  # type: ignore[no-untyped-def]
    look_like(onednn=True, instructions=True, amx=amx, cpu=cpu)
    assert choose("auto", "cpu").dtype == dtype
    asked = choose("bfloat16", "cpu")
    assert asked.warning is None if dtype == "bfloat16" else "27 s in bfloat16 and 23 s in float32" in asked.lines[1]


def test_a_slow_dtype_is_taken_with_a_warning(look_like) -> None:  # type: ignore[no-untyped-def]
    look_like(onednn=False, instructions=False)
    asked, resumed = choose("bfloat16", "cpu"), choose("auto", "cpu", begun="bfloat16")
    for chosen, remedy in ((asked, "use float32"), (resumed, "name=")):
        assert chosen.dtype == "bfloat16"
        assert chosen.warning is not None
        assert "200 s" in chosen.lines[1]
        assert remedy in chosen.lines[1]
    assert choose("float32", "cpu").warning is None
    look_like(onednn=True, instructions=True)
    assert choose("bfloat16", "cpu").warning is None


def test_a_resumed_run_keeps_its_dtype_unless_another_is_asked_for(look_like) -> None:  # type: ignore[no-untyped-def]
    look_like(onednn=True, instructions=True)
    assert choose("auto", "cpu", begun="float32").dtype == "float32"
    assert choose("bfloat16", "cpu", begun="float32").dtype == "bfloat16"  # which the identity then refuses


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", "cuda").dtype == "bfloat16"  # a plan for GPUs elsewhere
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose("auto", "cuda").lines == ["model.dtype: float32 (auto: V100 does not multiply bfloat16)"]


@pytest.mark.slow
def test_onednn_held_to_avx2_has_no_bfloat16() -> None:
    code = "from aipo.model.precision import choose; print(choose('auto', 'cpu').dtype)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "float32\n"


def test_nothing_computes_in_a_dtype_that_is_still_open() -> None:
    config = load_config("tiny.yaml", ["model.dtype=auto"])
    with pytest.raises(ValueError, match="still auto"):
        assert config.model.bfloat16
    settled = choose("auto", "cuda" if torch.cuda.is_available() else "cpu").settle(config)
    assert settled.model.bfloat16 == (settled.model.dtype == "bfloat16")
    assert settled == config.model_copy(update={"model": settled.model})
