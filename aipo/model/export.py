"""From what a user calls a model to one that loads: a hub id, a folder, a run of ours or one of its checkpoints.

``python -m aipo.model.export RUN/checkpoints/best`` prints the Hugging Face folder that it makes of a checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from aipo.config import Config, load_config
from aipo.errors import UserError, exit_code
from aipo.model.adapters import merge, originals
from aipo.model.loading import save_model
from aipo.problems.embedded import resolve_model
from aipo.record.checkpoints import damage, latest


@dataclass(frozen=True)
class NamedModel:
    """``path`` is what ``from_pretrained`` gets; ``run`` and ``config`` are those of the run it comes from."""

    name: str
    path: str
    run: Path | None = None
    config: Config | None = None


def find_model(spec: str) -> NamedModel:
    """A run folder means its ``final`` model, or its newest checkpoint while it has none.

    Checkpoints are also named by ``RUN/checkpoints/step-000040``, ``.../best`` and ``.../latest``; their weights are
    written once to ``RUN/exported`` as a Hugging Face folder. Raises UserError where there is nothing to load.
    """
    path = Path(spec).expanduser()
    run = _run_of(path)
    if run is None:
        return NamedModel(_name(spec), resolve_model(spec))
    config = load_config(str(run / "config.yaml"))
    if path in (run, run / "final") and (run / "final" / "config.json").is_file():
        return NamedModel(run.name, str(run / "final"), run, config)
    checkpoint = latest(run / "checkpoints") if path in (run, run / "final") else _pointed_at(path)
    if checkpoint is None:
        raise UserError(f"{spec} has neither a final model nor a checkpoint yet: let the run reach its first one")
    if problem := damage(checkpoint):
        raise UserError(f"{spec} is not a complete checkpoint: {problem}")
    folder = run / "exported" / checkpoint.name
    export(checkpoint, folder, config)
    return NamedModel(f"{run.name}-{checkpoint.name}", str(folder), run, config)


def export(checkpoint: Path, folder: Path, config: Config) -> None:
    """Write the weights of a checkpoint to ``folder`` in Hugging Face format, in ``model.dtype``; nothing if there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder.parent.mkdir(exist_ok=True)
        locked = FileLock(folder.with_name(f"{folder.name}.lock")).acquire()
    except OSError as error:
        raise UserError(
            f"{folder.parent}, where {checkpoint.name} goes as a Hugging Face folder, cannot be written "
            f"({error.strerror}): make it writable, or copy the run to where you may write"
        ) from error
    with locked:
        if folder.is_dir():
            return
        base = resolve_model(config.model.path)
        dtype = getattr(torch, config.model.dtype)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        state = {name: tensor.to(dtype) for name, tensor in weights(checkpoint, config.lora.alpha).items()}
        names = {name for name, _ in model.named_parameters()}
        if missing := names - state.keys():
            raise UserError(f"{checkpoint} lacks {sorted(missing)[0]}: it does not belong to {config.model.path}")
        model.load_state_dict({name: state[name] for name in names}, strict=False)  # strict would want tied heads twice
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(model, AutoTokenizer.from_pretrained(base), temporary)
        temporary.rename(folder)


def weights(checkpoint: Path, lora_alpha: float) -> dict[str, torch.Tensor]:
    """Float32 weights of a checkpoint under their Hugging Face names, adapters merged, whatever it was sharded over."""
    plain = checkpoint / "plain.pt"
    whole = checkpoint / "deepspeed" / "mp_rank_00_model_states.pt"  # of ZeRO-1 and ZeRO-2, which shard no weights
    if plain.is_file():
        state = torch.load(plain, map_location="cpu", weights_only=True)["policy"]
    elif whole.is_file():
        state = torch.load(whole, map_location="cpu", weights_only=True)["module"]
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed")
    state = {name.removeprefix("model."): tensor.float() for name, tensor in state.items()}
    return {name: merge(parts, lora_alpha) for name, parts in originals(state)}


def model_stamp(path: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's files: other weights in the same folder are another model."""
    folder = Path(path)
    if not folder.is_dir():
        return []
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]


def _run_of(path: Path) -> Path | None:
    """The run folder that ``path`` is, or whose final model or checkpoint it is; one may have lost its checkpoints."""
    candidates = [path]
    if path.name == "final":
        candidates.append(path.parent)
    if path.parent.name == "checkpoints":
        candidates.append(path.parent.parent)
    for each in candidates:
        if (each / "config.yaml").is_file() and any((each / name).is_dir() for name in ("checkpoints", "final")):
            return each
    return None


def _pointed_at(path: Path) -> Path:
    """``best`` and ``latest`` are files that hold the name of a step folder."""
    return path.parent / path.read_text().strip() if path.is_file() else path


def _name(spec: str) -> str:
    return Path(spec).name if Path(spec).expanduser().is_dir() else spec.rpartition("/")[2].replace(":", "-")


@exit_code
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aipo.model.export", description=__doc__)
    parser.add_argument("model", help="RUN, RUN/checkpoints/step-000040, RUN/checkpoints/best")
    print(find_model(parser.parse_args().model).path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
