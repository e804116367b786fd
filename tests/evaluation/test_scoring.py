"""Files that survive a kill, and what is still to be drawn. The whole path runs in tests/e2e/test_evaluate.py."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from aipo.config import load_config
from aipo.errors import UserError
from aipo.evaluation.benchmarks import Benchmark
from aipo.evaluation.scoring import CompletionFiles, Validator, Watched, complete, pending, requests_for
from aipo.metrics import accuracy_summary
from aipo.problems.datasets import Problem, fingerprint
from aipo.problems.prompts import Prompter
from aipo.record.progress import Progress
from aipo.rollout.base import Completion, Request, Sampling
from aipo.rollout.collect import Collector, request_seed
from aipo.rollout.hf import HfEngine
from aipo.verify import Verifier
from tests.tiny import make_tiny

PROBLEMS = [Problem(f"p{i}", f"What is {i} + 1?", str(i + 1)) for i in range(5)]
SUMS = Benchmark("sums", PROBLEMS, fingerprint(PROBLEMS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompters(model: Path) -> dict[str, Prompter]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = Prompter(tokenizer, system=None, examples=(), suffix=None, thinking=False, max_prompt_tokens=512)
    return {"math": made, "choice": made}


def row(id: str, sample: int, **more: object) -> dict[str, object]:
    return {"benchmark": "sums", "id": id, "sample": sample, **more}


def test_a_torn_row_is_drawn_again_and_leaves_no_trace(tmp_path: Path) -> None:
    files = CompletionFiles(tmp_path)
    files.append(row("p0", 0, answer="∑ \u2028 1"))
    files.append(row("p0", 1))
    files.close()
    path = tmp_path / "rank-0" / "sums.jsonl"
    path.write_bytes(path.read_bytes() + b'{"benchmark": "sums", "id": "p1", "sam')
    assert [(r["id"], r["sample"]) for r in files.read("sums")] == [("p0", 0), ("p0", 1)]
    files.append(row("p1", 0))
    files.close()
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [(r["id"], r["sample"]) for r in rows] == [("p0", 0), ("p0", 1), ("p1", 0)]
    assert rows[0]["answer"] == "∑ \u2028 1"


def test_ranks_are_merged_into_one_file(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank-{rank}").mkdir()
    (tmp_path / "rank-1" / "sums.jsonl").write_text(json.dumps(row("p1", 0)) + "\n" + json.dumps(row("p0", 1)) + "\n")
    (tmp_path / "rank-0" / "sums.jsonl").write_text(json.dumps(row("p0", 0)) + "\n")
    (tmp_path / "rank-0" / "others.jsonl").write_text("another benchmark\n")
    files = CompletionFiles(tmp_path)
    merged = files.merge("sums")
    assert [(r["id"], r["sample"]) for r in merged] == [("p0", 0), ("p0", 1), ("p1", 0)]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jsonl")) == [
        "rank-0/others.jsonl",
        "sums.jsonl",
    ]
    assert not (tmp_path / "rank-1").exists()
    files.append(row("p2", 0))  # a later call with more problems
    files.close()
    assert len(files.merge("sums")) == 4
    assert files.merge("sums") == files.read("sums")


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text(json.dumps(row("p0", 0)) + "\nnonsense\n")
    with pytest.raises(UserError, match=r"sums\.jsonl, row 2 is damaged"):
        CompletionFiles(tmp_path).read("sums")


def test_ranks_share_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CompletionFiles(tmp_path)
    items = SUMS.items(samples=3, seed=0)
    for i in (0, 7, 14):
        files.append(row(items[i].problem.id, items[i].sample))
    files.close()
    shares = []
    for rank in range(2):
        monkeypatch.setattr("aipo.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("aipo.distributed.world_size", lambda: 2)
        shares.append(pending(items, files))
    assert sorted(shares[0] + shares[1]) == [i for i in range(15) if i not in (0, 7, 14)]
    assert len(shares[0]) == len(shares[1]) == 6


def test_seeds_differ_by_everything_and_depend_on_nothing_else() -> None:
    items = SUMS.items(samples=4, seed=0)
    assert len({item.seed for item in items}) == 20
    fewer = {item.key: item.seed for item in Benchmark("sums", PROBLEMS[2:4], "").items(samples=2, seed=0)}
    assert fewer.items() <= {item.key: item.seed for item in items}.items()
    assert not {item.seed for item in items} & {item.seed for item in SUMS.items(samples=4, seed=1)}
    other = Benchmark("others", PROBLEMS, "").items(samples=4, seed=0)
    assert not {item.seed for item in items} & {item.seed for item in other}


def test_a_prompt_that_does_not_fit_is_named_before_a_model_loads(prompters: dict[str, Prompter]) -> None:
    items = SUMS.items(samples=2, seed=0)
    requests = requests_for(items, prompters, room=512)
    assert [r.seed for r in requests] == [item.seed for item in items]
    assert requests[0].prompt_ids == prompters["math"].encode("What is 0 + 1?")
    with pytest.raises(
        UserError, match=r"sums: the prompt of question p0 has \d+ tokens, but .* leaves 3 .*--max-tokens"
    ):
        requests_for(items, prompters, room=3)


class Scripted:
    """An engine that says what the test wants; everything around it is real."""

    def __init__(self, texts: Sequence[list[int]], stop_after: int | None = None) -> None:
        self.texts, self.stop_after = texts, stop_after

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        done = [Completion(ids, [0.0] * len(ids), "stop") for ids in self.texts]
        for i, completion in enumerate(done):
            if i == self.stop_after:
                raise RuntimeError("the engine died")
            assert on_done is not None
            on_done(i, completion)
        return done


def test_rows_say_what_was_drawn_and_judged(tmp_path: Path, prompters: dict[str, Prompter]) -> None:
    encode = prompters["math"].tokenizer.encode
    texts = [r"so \boxed{1}", "no answer", r"\boxed{\frac{6}{2}}", r"\boxed{5}"]
    items = Benchmark("sums", PROBLEMS[:4], "").items(samples=1, seed=0)
    files = CompletionFiles(tmp_path)
    ticks = []
    with Verifier(workers=1) as verifier:
        complete(
            items,
            requests_for(items, prompters, room=512),
            engine=Scripted([encode(text) for text in texts]),  # type: ignore[arg-type]
            prompters=prompters,
            verifier=verifier,
            sampling=Sampling(16),
            files=files,
            on_done=lambda: ticks.append(1),
        )
    rows = files.read("sums")
    assert [r["correct"] for r in rows] == [True, False, True, False]
    assert [r["verdict"] for r in rows] == ["correct", "no_answer", "correct", "wrong"]
    assert [r["answer"] for r in rows] == ["1", None, r"\frac{6}{2}", "5"]
    assert [r["completion"] for r in rows] == texts
    assert [r["tokens"] for r in rows] == [len(encode(text)) for text in texts]
    assert rows[0]["question"] == PROBLEMS[0].question
    assert len(ticks) == 4


def test_what_was_judged_before_a_crash_is_kept(tmp_path: Path, prompters: dict[str, Prompter]) -> None:
    encode = prompters["math"].tokenizer.encode
    items = SUMS.items(samples=1, seed=0)
    files = CompletionFiles(tmp_path)
    with Verifier(workers=1) as verifier, pytest.raises(RuntimeError, match="the engine died"):
        complete(
            items,
            requests_for(items, prompters, room=512),
            engine=Scripted([encode(r"\boxed{1}")] * 5, stop_after=3),  # type: ignore[arg-type]
            prompters=prompters,
            verifier=verifier,
            sampling=Sampling(16),
            files=files,
        )
    assert len(files.read("sums")) == 3
    assert pending(items, files) == [3, 4]


class Blocks(HfEngine):
    """Notes the sizes of its calls, and that nothing of a call is held when the next one comes."""

    def __init__(self, model: Path) -> None:
        super().__init__(str(model), max_model_len=128, end_token_ids=[2], dtype="float32")
        self.sizes: list[int] = []
        self.held: list[weakref.ref[Completion]] = []

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        assert not any(held() for held in self.held)
        done = super().generate(*args, **kwargs)
        self.held = [weakref.ref(completion) for completion in done]
        self.sizes.append(len(done))
        return done


def test_blocks_draw_what_one_call_draws(
    tmp_path: Path, model: Path, prompters: dict[str, Prompter], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = SUMS.items(samples=2, seed=0)
    rows, ticks = [], []
    with Verifier(workers=1) as verifier:
        for block, sizes in ((10, [10]), (4, [4, 4, 2])):
            monkeypatch.setattr("aipo.evaluation.scoring.BLOCK", block)
            engine = Blocks(model)
            (folder := tmp_path / str(block)).mkdir()
            complete(
                items,
                requests_for(items, prompters, room=112),
                engine=engine,
                prompters=prompters,
                verifier=verifier,
                sampling=Sampling(16),
                files=CompletionFiles(folder),
                on_done=lambda: ticks.append(1),
            )
            assert engine.sizes == sizes
            rows.append(CompletionFiles(folder).read("sums"))
    assert rows[0] == rows[1]
    assert len({row["completion"] for row in rows[0]}) == 10
    assert len(ticks) == 20


def test_gpqa_text_is_not_written(tmp_path: Path, prompters: dict[str, Prompter]) -> None:
    secret = Problem("q", "A secret?\n\nA) yes\nB) no", "A", "choice", options=("yes", "no"))
    items = Benchmark("gpqa_diamond", [secret], "").items(samples=6, seed=0)
    letters = {item.problem.answer for item in items}
    assert letters == {"A", "B"}  # shuffled afresh for each sample
    for item in items:
        assert item.problem.question in ("A secret?\n\nA) yes\nB) no", "A secret?\n\nA) no\nB) yes")
    files = CompletionFiles(tmp_path)
    encode = prompters["choice"].tokenizer.encode
    with Verifier(workers=1) as verifier:
        complete(
            items,
            requests_for(items, prompters, room=512),
            engine=Scripted([encode(f"The secret is out.\nAnswer: {item.problem.answer}") for item in items]),  # type: ignore[arg-type]
            prompters=prompters,
            verifier=verifier,
            sampling=Sampling(16),
            files=files,
        )
    found = files.read("gpqa_diamond")
    assert all(r["correct"] for r in found)
    assert {r["option"] for r in found} == {0}  # the right one, whatever its letter
    assert "secret" not in (tmp_path / "rank-0" / "gpqa_diamond.jsonl").read_text()


def test_a_renamed_copy_of_gpqa_stays_at_home_too() -> None:
    secret = Problem("gpqa_diamond/12ab", "A secret?\n\nA) yes\nB) no", "A", "choice", options=("yes", "no"))
    for item in Benchmark("my_copy", [secret], "").items(samples=4, seed=0):
        assert item.text_stays_here
        right = item.problem.answer
        assert item.option_of(right) == 0
        assert item.option_of("B" if right == "A" else "A") == 1
        assert item.option_of("F") is None
        assert item.option_of(None) is None


def test_names_with_odd_characters(tmp_path: Path) -> None:
    files = CompletionFiles(tmp_path)
    files.append(row("p0", 0) | {"benchmark": "my[1]*?"})
    files.close()
    assert len(files.merge("my[1]*?")) == 1
    assert files.merge("my1") == []


# --- validation during training -----------------------------------------------------------------------------------

SAID = {  # of each question the two samples: what is said, and whether the length limit cut it
    "p0": [("1", False), ("2", False)],
    "p1": [("2", False), ("2", False)],
    "p2": [("9", True), ("no verdict", False)],
    "p3": [("9", False), ("4", False)],
    "secret/gpqa_diamond/p4": [("9", False), ("9", False)],
}
HELD_OUT = [*PROBLEMS[:4], Problem("secret/gpqa_diamond/p4", "What is 4 + 1?", "5")]


class Drawn:
    """An engine that says what stands in ``SAID``, the last request first."""

    asleep = True

    def __init__(self, prompter: Prompter, seed: int) -> None:
        self.prompter, self.calls = prompter, list[str]()
        self.sampling: list[Sampling] = []
        self.of_seed = {
            request_seed(seed, stream, question, sample): said
            for stream in ("validation", "watch/other")
            for question, samples in SAID.items()
            for sample, said in enumerate(samples)
        }

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, on_done: Any) -> list[Completion]:
        self.calls.append("generate")
        self.sampling.append(sampling)
        done = []
        for request in requests:
            text, cut = self.of_seed[request.seed]
            ids = self.prompter.tokenizer.encode(text)
            done.append(Completion(ids, [0.0] * len(ids), "length" if cut else "stop"))
        for i in reversed(range(len(done))):
            on_done(i, done[i])
        return done

    def sleep(self) -> None:
        self.calls.append("sleep")

    def sync(self, weights: Any) -> None:
        self.calls.append(f"sync {weights}")


class Judge:
    """A rewarder for which right is what equals the answer; what says so has no verdict."""

    def submit(self, problem: Problem, text: str, length: int, sample: int) -> float:
        return math.nan if text == "no verdict" else float(text == problem.answer)

    def collect(self, pending: Sequence[float]) -> tuple[Tensor, Tensor, dict[str, float]]:
        rewards = torch.tensor(pending)
        return rewards, rewards == 1, {}


def validator(prompter: Prompter) -> tuple[Validator, Drawn]:
    keys = ["rollout.max_tokens=9", "rollout.temperature=0.7", "validation.samples=2"]
    keys += ["validation.temperature=0.3", "validation.top_p=0.8", "validation.top_k=7"]
    config, engine = load_config("tiny.yaml", keys), Drawn(prompter, seed=3)
    collector = Collector(engine, prompter, Judge(), seed=3)  # type: ignore[arg-type]
    passes: Any = SimpleNamespace(
        wake=lambda asked: asked.calls.append("wake"), sharded=SimpleNamespace(full_parameters=lambda: "weights")
    )
    progress = Progress(active=False)
    watched = {"other": Watched(HELD_OUT[1:3], 2, every=3)}
    return Validator(collector, passes, progress, config, HELD_OUT, watched), engine


def test_a_validation_by_hand(prompters: dict[str, Prompter]) -> None:
    """Right are 1, 2, 0, 1 and 0 of two: 4 of 10, one of which has no verdict, and one was cut."""
    made, engine = validator(prompters["math"])
    accuracy, metrics = made.validate()
    assert engine.sampling == [Sampling(9, temperature=0.3, top_p=0.8, top_k=7)]
    assert engine.calls == ["wake", "generate"]
    assert (accuracy.value, accuracy.problems, accuracy.samples) == (0.4, 5, 10)
    tokens = [len(engine.prompter.tokenizer.encode(text)) for samples in SAID.values() for text, _ in samples]
    assert metrics == pytest.approx(
        {
            "validation/accuracy": 0.4,
            "validation/accuracy_low": accuracy.low,
            "validation/accuracy_high": accuracy.high,
            "validation/length_mean": sum(tokens) / 10,
            "validation/truncated": 0.1,
            "validation/no_verdict": 0.1,
        }
    )
    assert accuracy.low < 0.4 < accuracy.high
    right = [[True, False], [True, True], [False, False], [False, True], [False, False]]
    questions = [*(f"What is {i} + 1?" for i in range(4)), None]  # GPQA's text stays out of logs
    assert made.answers == [
        {"id": problem.id, "question": question, "right": each}
        for problem, question, each in zip(HELD_OUT, questions, right)
    ]


def test_ranks_validate_what_one_does(prompters: dict[str, Prompter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of unequal shares: the same figures, from rows in the order of the questions."""
    shares: list[Any] = []
    rows: list[list[list[bool]]] = []  # that an interval is drawn from: another order is another interval
    monkeypatch.setattr(
        "aipo.evaluation.scoring.accuracy_summary", lambda each: rows.append(each) or accuracy_summary(each)
    )
    alone, _ = validator(prompters["math"])
    expected = alone.validate()

    class Gathers(Exception): ...

    def first(share: Any) -> None:
        shares.append(share)
        raise Gathers

    monkeypatch.setattr("aipo.distributed.world_size", lambda: 2)
    for gather in (first, lambda share: shares):  # what each rank has to say, then what it makes of all
        monkeypatch.setattr("aipo.distributed.gather_objects", gather)
        for rank in range(2):
            monkeypatch.setattr("aipo.distributed.rank", lambda rank=rank: rank)
            made, _ = validator(prompters["math"])
            if gather is first:
                with pytest.raises(Gathers):
                    made.validate()
            else:
                assert made.validate() == expected
                assert made.answers == alone.answers
    assert rows[0] == rows[1] == rows[2] == [each["right"] for each in alone.answers]
    assert [ids for ids, _, _ in shares] == [["p0", "p2", HELD_OUT[4].id], ["p1", "p3"]]


def test_what_is_watched_leaves_nothing_behind(prompters: dict[str, Prompter]) -> None:
    made, engine = validator(prompters["math"])
    assert made.watch(2, last=False) == {}
    assert engine.calls == []
    for step, last in ((3, False), (4, True)):
        metrics = made.watch(step, last=last)
        assert (metrics["watch/other/accuracy"], metrics["watch/other/no_verdict"]) == (0.5, 0.25)
        assert all(name.startswith("watch/other/") for name in metrics)
    assert engine.calls == ["wake", "generate", "sleep", "sync weights"] * 2
    assert made.answers == []
