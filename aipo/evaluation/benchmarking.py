"""From the options of evaluate.py to a finished evaluation: everything is checked first, then drawn, then summed up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from aipo import distributed
from aipo.config import Config, load_config
from aipo.errors import UserError
from aipo.evaluation.benchmarks import CHOICE_SUFFIX, EMBEDDED, MATH_SUFFIX, PAPER, Benchmark, load_benchmarks
from aipo.evaluation.results import (
    Evaluation,
    Results,
    gains,
    intervention_rows,
    load_results,
    make_console,
    markdown,
    otf_of_run,
    result_rows,
    save_results,
    settings_differ,
    shared_problems,
    show,
    summarize,
)
from aipo.evaluation.scoring import CompletionFiles, complete, pending, requests_for
from aipo.inputs import check_compiler
from aipo.model.export import NamedModel, find_model, model_stamp
from aipo.model.loading import check_weights, read_folder
from aipo.model.precision import choose, this_device
from aipo.problems.embedded import MODEL
from aipo.problems.prompts import Prompter
from aipo.record.checkpoints import digest, flatten, write_atomically
from aipo.record.jsonl import plain
from aipo.record.plots import draw_bars
from aipo.record.progress import Progress
from aipo.record.tracker import versions
from aipo.report.evaluation_report import evaluation_report, is_evaluation
from aipo.rollout import RolloutEngine, Sampling, make_engine, require_engine
from aipo.rollout.interventions import DEFAULT_WORDS, Intervention, describe, mined_tokens, variant_ids
from aipo.verify import Verifier

DEFAULT_CONFIG = "smollm2_135m.yaml"
QWEN_LENGTH = 32768  # Qwen3's advice for most questions
MINED = len(DEFAULT_WORDS)
FORCE_THRESHOLD = {"nucleus": 0.2, "probability": 0.2, "rank": 10}  # nucleus: the paper; the others: ours

QUESTIONS = "questions of"  # before the benchmark's name: a key of settings.json, the one kind that may be added

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is asked of which model, and how; ``settings`` is all that the completions depend on."""

    model: NamedModel
    benchmarks: list[Benchmark]
    prompters: dict[str, Prompter]  # by kind of problem
    sampling: Sampling
    context: int  # tokens that the model can read
    settings: dict[str, Any]


def run(options: argparse.Namespace) -> None:
    """Evaluate, once or once for each intervention, and print the tables. UserError for what the user can mend."""
    console = make_console()
    first = distributed.rank() == 0
    with Progress(active=first, console=console) as progress, Evaluator(options, progress) as evaluator:
        job = make_job(options, progress.say)
        baseline = load_baseline(options.baseline, job.benchmarks) if options.baseline else None
        otf = otf_of_run(job.model.run) if options.otf is None and job.model.run else options.otf
        variants = {"baseline": job}
        if options.intervene:
            variants |= intervened(job, options, progress.say)
        folders = {name: open_folder(variants[name], options, name) for name in wanted(options.intervene)}
        distributed.on_first(lambda: check_kept(folders.values(), baseline, job.benchmarks))
        results = {name: evaluator.results(variants[name], folder) for name, folder in folders.items()}
        if not first:
            return
        for name, result in results.items():
            content = {"model": job.model.name, "settings": variants[name].settings, "versions": versions()}
            save_results(folders[name], content, result)
            gained = gains(result, baseline.results, otf) if baseline else None
            for line in settings_differ(variants[name].settings, baseline.settings) if baseline else ():
                progress.say(f"note: --baseline was measured with another {line}")
            title = f"{job.model.name}, {options.samples} samples a problem" + (f", MI {name}" * (name != "baseline"))
            show(*result_rows(result, gained), title, console)
            failed = [f"{n} {r.timed_out:.2%} / {r.killed:.2%}" for n, r in result.items() if r.timed_out + r.killed]
            if failed:
                progress.say(f"checks that timed out / were killed: {', '.join(failed)}")
            progress.say(f"results: {save_results(folders[name], content, result, gained)}")
            against = []
            if baseline:
                beside = options.baseline if options.baseline.is_dir() else options.baseline.parent
                against = [beside] if is_evaluation(beside) else []
            page = evaluation_report([*against, folders[name]], folders[name] / "report.html")
            progress.say(f"report: {page}")
        if len(results) > 1:
            show(*intervention_rows(results), "accuracy with and without high-MI tokens", console)
            of = digest([variants[name].settings for name in folders])[:8]
            target = folders["baseline"] / f"interventions-{of}"
            write_atomically(target.with_suffix(".md"), markdown(*intervention_rows(results)))
            draw_bars(results, target.with_suffix(".png"))
            progress.say(f"table and figure: {target}.md, .png")


def load_baseline(path: Path, benchmarks: Sequence[Benchmark]) -> Evaluation:
    """Results to compare with. UserError, before hours of generation, where they are of other problems."""
    found = load_results(path)
    try:
        shared_problems(found.results, {benchmark.name: benchmark for benchmark in benchmarks})
    except UserError as error:
        raise UserError(f"--baseline {path}: {error}") from None
    return found


def check_kept(folders: Iterable[Path], baseline: Evaluation | None, benchmarks: Sequence[Benchmark]) -> None:
    """UserError, before hours of generation, where results that a folder has already are damaged, or of other
    problems than those of the baseline, beside which the page will show them."""
    asked = {benchmark.name: benchmark for benchmark in benchmarks}
    for folder in folders:
        kept = load_results(folder).results if is_evaluation(folder) else {}
        if baseline is not None:
            try:
                shared_problems(baseline.results, {**kept, **asked})
            except UserError as error:
                raise UserError(f"{folder}: {error}, or choose another --out") from None


def wanted(intervene: str | None) -> list[str]:
    return ["baseline", "drop", "force"] if intervene == "both" else [intervene or "baseline"]


def make_job(options: argparse.Namespace, say: Say) -> Job:
    """Check everything that can be checked without weights."""
    config = load_config(options.config) if options.config else None
    names = [name.strip() for name in options.benchmarks.split(",") if name.strip()] or list(PAPER)
    spec = options.model or (config.model.path if config else MODEL)
    model = distributed.on_first(lambda: find_model(spec))
    config = config or model.config
    if config is None and spec == MODEL and names == [EMBEDDED]:
        config = load_config(DEFAULT_CONFIG)  # the prompt that the embedded problems are made for
    folder = read_folder(model.path, key="--model", name=spec)
    check_weights(model.path, key="--model")
    benchmarks = distributed.on_first(lambda: load_benchmarks(names, limit=options.limit, say=say))

    context = folder.architecture.get_text_config().max_position_embeddings
    thinking = options.thinking if options.thinking is not None else config.data.thinking if config else True
    sampling = Sampling(
        options.max_tokens or longest(context, config),
        temperature=(0.6 if thinking else 0.7) if options.temperature is None else options.temperature,
        top_p=(0.95 if thinking else 0.8) if options.top_p is None else options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
    )
    if sampling.max_tokens >= context:
        raise UserError(f"--max-tokens {sampling.max_tokens}: {spec} reads {context} tokens, the prompt included")
    require_engine(options.engine)
    if options.engine == "vllm":
        check_compiler()
    prompt: dict[str, Any] = {
        "system": config.data.system if config else None,
        "examples": config.data.examples if config else (),
        "thinking": thinking,
    }
    suffixes = {"math": config.data.suffix if config else MATH_SUFFIX, "choice": CHOICE_SUFFIX}
    prompters = {
        kind: Prompter(
            folder.tokenizer, **prompt, suffix=suffix, max_prompt_tokens=context, generation_config=folder.generation
        )
        for kind, suffix in suffixes.items()
    }
    precision = distributed.on_first(lambda: choose(options.dtype, this_device()))
    for line in precision.lines:
        say(line.replace("model.dtype", "dtype"))
    settings = {
        "model": spec,
        "files": model_stamp(model.path),
        **prompt,
        "suffixes": suffixes,
        "sampling": asdict(sampling),
        "seed": options.seed,
        "lenient": options.lenient,
        "engine": options.engine,
        "dtype": precision.dtype,
    }
    count = sum(len(benchmark.problems) for benchmark in benchmarks) * options.samples
    which = ", ".join(f"{benchmark.name} ({len(benchmark.problems)})" for benchmark in benchmarks)
    say(f"{model.name} on {which}: {count} completions of at most {sampling.max_tokens} tokens")
    return Job(model, benchmarks, prompters, sampling, context, plain(settings))


def longest(context: int, config: Config | None) -> int:
    """Tokens of a completion where the user does not say: those of training, else what leaves room for a prompt."""
    return config.rollout.max_tokens if config else min(QWEN_LENGTH, context - min(2048, context // 4))


def intervened(plan: Job, options: argparse.Namespace, say: Say) -> dict[str, Job]:
    """The plan with high-MI tokens dropped, and with them forced."""
    tokenizer = plan.prompters["math"].tokenizer
    if options.tokens_from:
        mined = mined_tokens(options.tokens_from, tokenizer, MINED)
        ids, lines = [token.token_id for token in mined], list(map(str, mined))
    else:
        words = options.tokens.split(",") if options.tokens else DEFAULT_WORDS
        variants = variant_ids(tokenizer, words, case=options.case)
        ids, lines = [i for each in variants.values() for i in each], describe(tokenizer, variants)
    say("tokens of the intervention:")
    for line in lines:
        say(f"  {line}")
    try:
        threshold = options.force_threshold
        threshold = FORCE_THRESHOLD[options.force_rule] if threshold is None else threshold
        made = {
            "drop": Intervention("drop", tuple(ids)),
            "force": Intervention("force", tuple(ids), options.force_rule, threshold),
        }
    except ValueError as error:
        raise UserError(f"--intervene: {error}") from None
    plans = {}
    for name, each in made.items():
        sampling = replace(plan.sampling, intervention=each)
        plans[name] = replace(plan, sampling=sampling, settings=plain(plan.settings | {"sampling": asdict(sampling)}))
    return plans


def open_folder(plan: Job, options: argparse.Namespace, variant: str) -> Path:
    """The folder of these settings: made, or found with the completions that it has already."""
    suffix = "" if variant == "baseline" else f"-{variant}"
    if options.out:
        folder = options.out / variant if suffix else options.out
    else:
        folder = Path("evaluations") / f"{plan.model.name}-{digest(plan.settings)[:8]}{suffix}"
    now = plan.settings | {f"{QUESTIONS} {b.name}": b.fingerprint for b in plan.benchmarks}

    def prepare() -> None:
        path = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = json.loads(path.read_text()) if path.is_file() else {}
            was, new = flatten(before), flatten(now)
            same = {key for key in was.keys() | new.keys() if not key.startswith(QUESTIONS)} if was else set()
            keys = sorted(same | (was.keys() & new.keys()))
            if changed := [
                f"{k} was {was.get(k)!r:.80}, is {new.get(k)!r:.80}" for k in keys if was.get(k) != new.get(k)
            ]:
                raise UserError(f"{folder} holds another evaluation, choose another --out: {'; '.join(changed)}")
            write_atomically(path, json.dumps(before | now, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be written ({error.strerror}): choose another folder") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): choose another --out") from error

    distributed.on_first(prepare)
    return folder


class Evaluator(ExitStack):
    """Draws what is missing. The engine is built when the first completion is, and serves all passes until the end."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        super().__init__()
        self.options, self.progress = options, progress
        self._engine: RolloutEngine | None = None
        self._verifier: Verifier | None = None

    def results(self, plan: Job, folder: Path) -> Results:
        """Draw what ``folder`` lacks and sum up. All ranks call it together."""
        distributed.on_first(lambda: self._take(folder))
        self._draw(plan, folder)
        files, samples = CompletionFiles(folder), self.options.samples
        return distributed.on_first(
            lambda: {b.name: summarize(b, files.merge(b.name), samples) for b in plan.benchmarks}
        )

    def _take(self, folder: Path) -> None:
        """The folder is this process's until it ends; a lock that the system drops with the process."""
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder}: another evaluate.py works here: wait for it, or choose another --out") from None
        self.callback(lock.release)

    def _draw(self, plan: Job, folder: Path) -> None:
        files = CompletionFiles(folder)
        every = [item for b in plan.benchmarks for item in b.items(self.options.samples, self.options.seed)]
        requests = requests_for(every, plan.prompters, room=plan.context - plan.sampling.max_tokens)
        mine = pending(every, files)
        counts = distributed.gather_objects(len(mine))  # also: no rank writes before all have read
        if sum(counts):
            prompt = max(len(request.prompt_ids) for request in requests)
            engine, verifier = self._parts(plan, prompt + plan.sampling.max_tokens)
            share = "completions" if len(counts) == 1 else f"completions of this rank, 1 of {len(counts)}"
            with self.progress.task(share, len(mine)) as task:
                complete(
                    [every[i] for i in mine],
                    [requests[i] for i in mine],
                    engine=engine,
                    prompters=plan.prompters,
                    verifier=verifier,
                    sampling=plan.sampling,
                    files=files,
                    lenient=self.options.lenient,
                    on_done=task.advance,
                )
            distributed.gather_objects(None)  # all have closed their files

    def _parts(self, plan: Job, max_model_len: int) -> tuple[RolloutEngine, Verifier]:
        if self._engine is None or self._verifier is None:
            options = self.options
            more: dict[str, Any] = {
                "dtype": plan.settings["dtype"],
                "seed": options.seed,
                "gpu_memory_utilization": options.gpu_memory,
            }
            if options.engine == "vllm":
                more["kv_cache_gb"] = None if torch.cuda.is_available() else options.kv_cache_gb
            self.progress.say(f"building the engine ({options.engine})")
            self._engine = make_engine(
                options.engine,
                plan.model.path,
                max_model_len=max_model_len,
                end_token_ids=sorted(plan.prompters["math"].end_ids),
                interventions=bool(options.intervene),
                **more,
            )
            self.callback(self._engine.close)
            self._verifier = Verifier()
            self.callback(self._verifier.close)
        return self._engine, self._verifier
