"""From a config to a finished run: what can be wrong is checked first, then the parts are built and joined."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from aipo import distributed
from aipo.config import Config, dump_config
from aipo.curriculum import Curriculum
from aipo.errors import TrainingError
from aipo.inputs import Inputs, check_cache, check_inputs, find_latents, may_go_on
from aipo.labelling import DEPENDS_ON, LABELLED_TOGETHER, histogram, label, label_code, label_folder, label_questions
from aipo.model.export import model_stamp
from aipo.model.loading import save_model
from aipo.model.precision import Precision, choose
from aipo.passes import Passes
from aipo.policy import make_policy
from aipo.problems.embedded import cache_folder
from aipo.record.batches import REPLAY, forget_batches
from aipo.record.checkpoints import CheckpointStore, fsync, manifest, resolve
from aipo.record.jsonl import read_jsonl
from aipo.record.progress import Progress, RunConsole, final_table, summarize
from aipo.record.slowness import Slowness
from aipo.record.tracker import Tracker, peak_memory_bytes, prepare_run_folder
from aipo.report.run_report import report
from aipo.reward import Rewarder
from aipo.rollout import engine_options, make_engine
from aipo.rollout.check import check_weight_sync, engine_gap
from aipo.rollout.collect import Collector
from aipo.selection import TokenSelector
from aipo.sharding import Sharded, frozen_reference, shard
from aipo.trainer import Trainer

LABEL_BLOCK = {"cpu": 64, "cuda": 512}  # questions a rank labels between two savings; a GPU's engine sleeps after each


def run(config: Config, *, resume: str = "none", device: torch.device) -> bool:
    """Train as ``config`` says. Returns False if the run was stopped by a signal before its end."""
    rank, world = distributed.rank(), distributed.world_size()

    def look_back() -> tuple[Path | None, dict[str, Any], Precision]:
        found = resolve(config.folder / "checkpoints", resume)
        saved = {} if found is None else json.loads((found / "identity.json").read_text())
        return found, saved, choose(config.model.dtype, device.type, begun=saved.get("model.dtype"))

    checkpoint, saved, precision = distributed.on_first(look_back)  # ranks agree, on whatever machines they are
    config = precision.settle(config)
    inputs = check_inputs(config, world)
    locks = []  # held until the run ends

    def prepare() -> None:
        if checkpoint is not None:
            may_go_on(saved, inputs.identity)
        elif config.curriculum.enabled:
            check_cache()
        locks.append(prepare_run_folder(config.folder, resume, config_text=dump_config(config)))

    distributed.on_first(prepare)
    seed_everything(config.seed, rank)
    console = RunConsole()
    slowness = Slowness(precision, device.type)
    passes = {"validation": config.validation.every}
    passes |= {f"watch/{name}": each.every for name, each in inputs.watched.items()}
    with Progress(
        config.optim.steps,
        active=rank == 0,
        console=console,
        every=passes,
        budget=config.optim.generated_tokens,
        why_long=slowness.reasons,
    ) as progress:
        for note in (*inputs.notes, *precision.lines):
            progress.say(note)
        trainer = build(config, inputs, checkpoint, progress, device)
        try:
            finished = go(trainer, config, inputs, checkpoint)
        except BaseException as error:
            with distributed.at_most(20, error):
                close(trainer)
                trainer.tracker.close()
            raise
        close(trainer)
    if finished and trainer.before and trainer.accuracy:
        peaks = distributed.gather_objects(peak_memory_bytes())
        final, noted = config.folder / "final", config.folder / "summary.json"
        # the summary of an earlier end is there only if no step was made since: its table is shown again
        shown = distributed.on_first(lambda: final.is_dir() and noted.is_file())
        if not shown:
            trainer.collector.engine.sleep()  # the last validation woke it, and weights are gathered beside it
            save_final_model(trainer.sharded, inputs, final)
        if rank == 0:
            summary = summarize(
                read_jsonl(config.folder / "metrics.jsonl"),
                before=trainer.before,
                after=trainer.accuracy,
                peak_memory_bytes=json.loads(noted.read_text())["peak_memory_bytes"]
                if shown
                else {key: max(peak[key] for peak in peaks) for key in peaks[0]},
                run_folder=config.folder,
            )
            final_table(summary, console=console)
    if config.tracking.report and rank == 0:
        try:
            path = report([config.folder])
            trainer.tracker.log_report(path)
            said = f"report: {path}"
        except Exception as error:  # of any kind: all that was computed is saved, and the page can be made again
            said = f"error: no report ({type(error).__name__}: {error}); again: python -m aipo.report {config.folder}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    trainer.tracker.close()
    trainer.collector.engine.close()
    return finished


def close(trainer: Trainer) -> None:
    """End its threads and worker processes."""
    trainer.generation.close()
    trainer.collector.rewarder.close()


def go(trainer: Trainer, config: Config, inputs: Inputs, checkpoint: Path | None) -> bool:
    """Restore or label, then train until the end or a signal."""
    if config.mi.gold_refresh == "never" and trainer.selector.uses_gold:  # the weights are still the initial ones
        trainer.collector.engine.sleep()
        trainer.progress.say(f"computing the gold states of {len(inputs.problems)} questions, once for the run")
        trainer.passes.keep_golds(inputs.problems)
    if checkpoint is not None:
        trainer.load(checkpoint)
        trainer.store.rewind(trainer.step)
        trainer.progress.say(f"resumed after step {trainer.step} from {checkpoint}")
    else:
        trainer.store.rewind(-1)
        if config.curriculum.enabled:
            # scores that look beyond one sequence depend on which questions a rank labels together
            block, local = LABEL_BLOCK[trainer.device.type], trainer.selector.scorer.local
            depends = DEPENDS_ON if local else (*DEPENDS_ON, *LABELLED_TOGETHER)
            folder = label_folder(
                cache_folder(),
                identity={k: v for k, v in inputs.identity.items() if k.startswith(depends)},
                model=model_stamp(inputs.model_path),
                code=label_code(),
                **({} if local else {"block": block}),
            )
            make = partial(label, collector=trainer.collector, passes=trainer.passes, selector=trainer.selector)
            labels = label_questions(inputs.problems, make, folder, block=block, progress=trainer.progress)
            trainer.curriculum.set_labels(labels)
            trainer.progress.say("questions by information peaks (N_peak):")
            for line in [*histogram(list(labels.values())), *filter(None, [trainer.curriculum.lopsided])]:
                trainer.progress.say(line)
    forget_batches(config.folder / REPLAY, range(trainer.step + 1))  # what comes after is run again
    if distributed.rank() == 0 and not trainer.finished:
        (config.folder / "summary.json").unlink(missing_ok=True)  # of an end that it has yet to come to again
    with signals() as stop:
        trainer.stop_requested = lambda: bool(stop)
        finished = trainer.train()
    if not finished and distributed.rank() == 0:
        trainer.progress.say(f"stopped after step {trainer.step}; go on with: {resume_command()}")
    return finished


def build(config: Config, inputs: Inputs, checkpoint: Path | None, progress: Progress, device: torch.device) -> Trainer:
    """Engine first, as long as its GPU is empty, then policy, optimizer, reference and the stages around them."""
    rank = distributed.rank()
    rollout = config.rollout
    options = engine_options(config, inputs.prompter.end_ids, device)
    if rollout.mode == "server":
        urls = [rollout.server_url] if isinstance(rollout.server_url, str) else rollout.server_url
        options |= {"urls": urls, "name": config.model.path, "timeout": rollout.server_timeout_s}
    else:
        options |= {"seed": config.seed + rank, "load_weights": False}
    progress.say(f"building the rollout engine ({rollout.engine}, {rollout.mode}) and the policy")
    engine = make_engine("server" if rollout.mode == "server" else rollout.engine, inputs.model_path, **options)
    engine.sleep()  # weights arrive by the first sync; until then its GPU memory serves the loading of the policy
    rewarder = Rewarder(config.rewards(), max_tokens=rollout.max_tokens, thinking=config.data.thinking)
    collector = Collector(engine, inputs.prompter, rewarder, seed=config.seed)
    policy = make_policy(config, inputs.model_path)
    sharded = shard(policy, config, device)
    reference = frozen_reference(config, inputs.model_path, device) if config.loss.kl_beta > 0 else None
    seed_everything(config.seed, rank)  # building engines draws random numbers
    prompts = [inputs.prompter.encode(problem.question, problem.origin) for problem in inputs.problems[:4]]
    passes = Passes(config, sharded, inputs.prompter, device, inputs.problems)
    passes.check_layout(prompts)
    log_probs = passes.completion_log_probs
    if rollout.check_sync:
        gap = check_weight_sync(engine, sharded.full_parameters, log_probs, prompts, seed=config.seed)
        progress.say(f"weight sync checked: {rollout.engine} and the policy differ by {gap:.4f} nats a token")
    else:
        engine.sync(sharded.full_parameters())
    return Trainer(
        config,
        problems=inputs.problems,
        held_out=inputs.held_out,
        watched=inputs.watched,
        collector=collector,
        passes=passes,
        reference=reference,
        selector=TokenSelector(config),
        curriculum=Curriculum(
            [problem.id for problem in inputs.problems],
            config.curriculum,
            config.mask,
            total_steps=config.optim.steps,
            seed=config.seed,
            origins=[problem.origin for problem in inputs.problems],
            weights=config.weights(),
        ),
        store=CheckpointStore(config.folder / "checkpoints", keep_last=config.checkpoint.keep_last, rank=rank),
        tracker=Tracker(
            config.folder,
            active=rank == 0,
            resume_step=-1 if checkpoint is None else manifest(checkpoint)["step"],
            config=config.model_dump(mode="json"),
            wandb_mode=config.tracking.wandb,
            project=config.tracking.project,
            plot_every=config.tracking.plot_every,
        ),
        progress=progress,
        identity=inputs.identity,
        engine_gap=partial(engine_gap, engine, log_probs, prompts, seed=config.seed),
        latents=find_latents(config, inputs.model_path),
    )


def save_final_model(sharded: Sharded, inputs: Inputs, folder: Path) -> None:
    """The trained weights as an ordinary Hugging Face folder with its tokenizer. Collective; rank 0 writes."""
    first, problem = distributed.rank() == 0, ""
    state = {}
    for name, tensor in sharded.full_parameters():
        if first:
            state[name] = tensor.detach().cpu()
    if first:
        temporary = folder.with_name(".tmp-final")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            save_model(sharded.policy.model, inputs.prompter.tokenizer, temporary, state=state)
            for file in temporary.iterdir():  # on the disk before summary.json says that the run has ended
                fsync(file)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: what transformers refuses to save
            problem = str(error)
            shutil.rmtree(temporary, ignore_errors=True)  # it may be what filled the disk
    if not distributed.all_true(not problem):
        raise TrainingError(
            f"the final model could not be written to {folder} {problem and f'({problem})'}; the last checkpoint is "
            f"intact: make room, then {resume_command()}"
        )


def seed_everything(seed: int, rank: int) -> None:
    random.seed(seed * 1009 + rank)
    np.random.seed((seed * 1009 + rank) % 2**32)
    torch.manual_seed(seed * 1009 + rank)


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted instead of ending the process; a second SIGINT ends it at once."""
    caught: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)
        if distributed.rank() == 0:
            with suppress(OSError):  # the same Ctrl-C may have ended who reads it; and no print within another
                os.write(2, b"stopping after this step; a checkpoint will be saved\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command() -> str:
    arguments = list(sys.argv[1:])
    if "--resume" in arguments:
        at = arguments.index("--resume")
        del arguments[at : at + 2]
    arguments = [a for a in arguments if not a.startswith("--resume=")]
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if os.environ.get("WORLD_SIZE", local) != local:
        return "the same command, and --resume auto"
    launcher = f"torchrun --nproc_per_node {local}" if "TORCHELASTIC_RUN_ID" in os.environ else "accelerate launch"
    return f"{launcher} " + shlex.join([sys.argv[0], *arguments, "--resume", "auto"])
