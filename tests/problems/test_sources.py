"""Preparing data sets, on invented files of the shapes that the hub has."""

import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aipo.errors import UserError
from aipo.problems.datasets import load_problems, render_options
from aipo.problems.sources import GROUPS, SOURCES, ensure, path_of, prepare

SECRET = "wherefore"  # stands in every invented GPQA question and option


def jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contest(path: Path, count: int = 30, **changed: object) -> Path:
    """``count`` invented problems with answers 0, 1, 2, ...; ``changed`` replaces fields of the first."""
    rows: list[dict[str, object]] = [{"problem": f"What is {n} plus zero?", "answer": str(n)} for n in range(count)]
    return jsonl(path, rows[0] | changed, *rows[1:])


def dapo(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": question, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": str(n)},
        }
        for n, (question, answer) in enumerate(pairs)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def gpqa(path: Path, count: int = 198, **changed: object) -> Path:
    rows: list[dict[str, object]] = []
    for n in range(count):
        row: dict[str, object] = {
            "Record ID": f"rec{n}",
            "Question": f"{SECRET} {n}?\n",
            "Correct Answer": f"{SECRET} r{n} ",
        }
        row |= {f"Incorrect Answer {i}": f"{SECRET} w{n}{i}" for i in (1, 2, 3)}
        rows.append(row | {"Subdomain": "Optics", "High-level domain": "Physics"})
    rows[0] |= changed
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- one set


def test_a_set_becomes_the_schema_and_says_what_it_is_made_of(tmp_path: Path) -> None:
    source = contest(tmp_path / "copy.jsonl", answer=r"336^\circ")
    report = prepare("aime25", local=source, out=tmp_path / "out")
    assert report.path == tmp_path / "out" / "aime25.jsonl"
    rows = read(report.path)
    assert len(rows) == 30
    assert all(set(row) == {"id", "question", "answer", "kind", "source"} for row in rows)
    assert [row["answer"] for row in rows] == ["336", *map(str, range(1, 30))]
    assert rows[0]["question"] == "What is 0 plus zero?"
    assert (rows[0]["kind"], rows[0]["source"]) == ("math", "copy.jsonl")
    assert len({row["id"] for row in rows}) == 30
    assert load_problems(str(report.path), split="validation").problems == report.problems
    assert report.notes == [r"answers rewritten like 336^\circ -> 336: 1"]
    assert r"note: answers rewritten like 336^\circ -> 336: 1" in str(report)
    meta = json.loads((tmp_path / "out" / "aime25.meta.json").read_text())
    assert meta["sha256"] == sha256(report.path)
    assert meta["source"] == {"local": str(source), "file": "copy.jsonl", "sha256": sha256(source)}
    assert (meta["problems"], meta["rows"], meta["notes"]) == (30, 30, report.notes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"aime25.jsonl", "aime25.meta.json"}


def test_ids_come_from_the_question_whatever_the_copy(tmp_path: Path) -> None:
    one = prepare("aime24", local=contest(tmp_path / "a.jsonl"), out=tmp_path)
    rows = [{"question": f"What is {n}  plus\nzero?", "answer": n, "id": n + 60} for n in reversed(range(30))]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    two = prepare("aime24", local=tmp_path / "b.json", out=tmp_path)
    assert {p.id: p.answer for p in one.problems} == {p.id: p.answer for p in two.problems}


@pytest.mark.parametrize(
    ("name", "count", "right"),
    [
        ("aime24", 29, "30"),
        ("aime25", 31, "30"),
        ("math500", 30, "500"),
        ("amc23", 41, "83 or 40"),
        ("amc23_40", 83, "40"),
    ],
)
def test_a_wrong_count_is_an_error_that_writes_nothing(tmp_path: Path, name: str, count: int, right: str) -> None:
    source = contest(tmp_path / "copy.jsonl", count)
    with pytest.raises(UserError, match=f"{count} problems in copy.jsonl, but {name} has {right}.*--any-count"):
        prepare(name, local=source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prepare(name, local=source, out=tmp_path / "out", any_count=True)
    assert len(read(report.path)) == count
    assert any(f"{name} has {right}" in note for note in report.notes)


def test_amc23_has_83_problems_or_the_40_of_2023(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": float(n)} for n in range(83)]  # JSON numbers such as 27.0
    assert read(prepare("amc23", local=jsonl(tmp_path / "a.jsonl", *rows), out=tmp_path).path)[27]["answer"] == "27"
    pq.write_table(pa.Table.from_pylist(rows[:40]), tmp_path / "b.parquet")  # float64
    report = prepare("amc23", local=tmp_path / "b.parquet", out=tmp_path)
    assert [p.answer for p in report.problems] == [str(n) for n in range(40)]
    assert report.notes == ["these are the 40 of 2023; the hub's file has 83, of 2022 and 2023"]


def test_math500_answers_are_never_touched(tmp_path: Path) -> None:
    answers = ["2516_8", r"\frac{1}{2}", "1,-2", "90^\\circ", "105263157894736842", "0.15", "3.0"]
    rows = [{"problem": f"Find {a}", "solution": "So ...", "answer": a, "level": 2, "subject": "x"} for a in answers]
    report = prepare("math500", local=jsonl(tmp_path / "a.jsonl", *rows), out=tmp_path, any_count=True)
    assert [p.answer for p in report.problems] == answers


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("aime24", {"answer": "1000"}, "row 1: its answer '1000' does not look like one of aime24"),
        ("aime25", {"answer": "336 degrees"}, "row 1: its answer '336 degrees'"),
        ("amc23", {"answer": "27.5"}, "row 1: its answer '27.5'"),
        ("math500", {"answer": ""}, "row 1: no answer"),
        ("math500", {"problem": None}, "row 1: no question or problem"),
        ("gsm8k_test", {"question": "q"}, r"row 1: its answer has no '#### ' line"),
        ("gpqa_diamond", {"Question": "q"}, "row 1: no Correct Answer"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=rf"copy.jsonl, {says}"):
        prepare(name, local=contest(tmp_path / "copy.jsonl", **change), out=tmp_path, any_count=True)


def test_the_known_wrong_answer_of_aime24(tmp_path: Path) -> None:
    question = r"Eight circles of radius $34$ are sequentially  tangent, and two of the circles ... Find $m+n$."
    wrong = prepare("aime24", local=contest(tmp_path / "a.jsonl", problem=question, answer="480"), out=tmp_path)
    assert wrong.problems[0].answer == "197"
    assert ["480, replaced by 197" in note for note in wrong.notes] == [True]
    right = prepare("aime24", local=contest(tmp_path / "a.jsonl", problem=question, answer="197"), out=tmp_path)
    assert (right.problems[0].answer, right.notes) == ("197", [])


def test_dapo_without_wrappers_repeats_and_conflicts(tmp_path: Path) -> None:
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is one?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    source = dapo(
        tmp_path / "dapo.parquet",
        (wrapped, "1"),
        ("What is  one?\n", "1"),
        ("What is two?", "2"),
        ("What is two?", "3"),
        ("What\nis two?", "2"),
        ("求 x", "105263157894736848"),
        ("Find n", "2" + "0" * 22),
        ("Find n", "2" + "0" * 22),
    )
    report = prepare("dapo_math_17k", local=source, out=tmp_path)
    assert [(p.question, p.answer) for p in report.problems] == [
        ("What is one?", "1"),
        ("求 x", "105263157894736848"),
        ("Find n", "2" + "0" * 22),
    ]
    assert report.dropped == {"repeats": 2, "answers disagree": 3, "options repeat": 0}
    assert report.rows == len(report.problems) + sum(report.dropped.values()) == 8
    distinct, chinese, rounded = report.notes
    assert distinct == "6 distinct questions (4 up to white space); upstream: 17,398"
    assert chinese.startswith("1 questions are in Chinese")
    assert f"105263157894736848 ({report.problems[1].id})" in rounded
    assert "2000" not in rounded
    assert [row["answer"] for row in read(report.path)][1] == "105263157894736848"
    assert "\n         -3  answers disagree\n" in str(report)


def test_gpqa_lies_apart_with_a_notice_and_shuffled_options(tmp_path: Path) -> None:
    report = prepare("gpqa_diamond", local=gpqa(tmp_path / "gpqa_diamond.csv"), out=tmp_path / "data")
    folder = tmp_path / "data" / "gpqa_diamond"
    assert report.path == path_of("gpqa_diamond", tmp_path / "data") == folder / "gpqa_diamond.jsonl"
    assert (folder / ".gitignore").read_text() == "*\n"
    assert "do not commit" in (folder / "NOTICE").read_text()
    problems = load_problems(str(report.path), split="validation").problems
    assert problems == report.problems
    for n, problem in enumerate(problems):
        assert problem.kind == "choice"
        assert problem.options["ABCD".index(problem.answer)] == f"{SECRET} r{n}"
        assert problem.question == f"{SECRET} {n}?" + render_options(problem.options)
    for letter in "ABCD":  # 198 draws of 1/4: 5 standard deviations are 30
        assert 20 < sum(problem.answer == letter for problem in problems) < 80
    again = prepare("gpqa_diamond", local=tmp_path / "gpqa_diamond.csv", out=tmp_path / "data")
    assert again.problems == report.problems


def test_gpqa_text_stands_in_no_message(tmp_path: Path) -> None:
    double = gpqa(tmp_path / "double.csv", **{"Incorrect Answer 1": f"{SECRET} r0"})
    report = prepare("gpqa_diamond", local=double, out=tmp_path, any_count=True)
    assert report.dropped["options repeat"] == 1
    assert SECRET not in str(report) + report.path.with_suffix(".meta.json").read_text()
    with pytest.raises(UserError, match="row 1: no Incorrect Answer 2") as caught:
        prepare("gpqa_diamond", local=gpqa(tmp_path / "hole.csv", **{"Incorrect Answer 2": ""}), out=tmp_path)
    assert SECRET not in str(caught.value)


def test_embedded_sets_are_written(tmp_path: Path) -> None:
    for name, split in (("embedded_train", "train"), ("embedded_held_out", "validation")):
        report = prepare(name, out=tmp_path)
        assert read(report.path)[0].keys() == {"id", "question", "answer", "kind", "source"}
        written = load_problems(str(report.path), split="train").problems
        assert written == load_problems("embedded:chain_sum", split=split).problems  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = prepare("aime24", local=contest(tmp_path / "a.jsonl"), out=tmp_path).path.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*--out"):
        prepare("aime24", local=tmp_path / "a.jsonl", out=tmp_path / "file")

    def fail(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        prepare("aime24", local=contest(tmp_path / "b.jsonl", answer="7"), out=tmp_path)
    assert (tmp_path / "aime24.jsonl").read_bytes() == old


# -------------------------------------------------------------------------------------- where files come from


def test_the_file_meant_in_a_folder(tmp_path: Path) -> None:
    alone = contest(tmp_path / "alone" / "whatever.jsonl")
    assert prepare("aime24", local=alone.parent, out=tmp_path).origin == "whatever.jsonl"
    contest(tmp_path / "many" / "aime24.jsonl")
    contest(tmp_path / "many" / "aime25.jsonl", 1)
    assert prepare("aime24", local=tmp_path / "many", out=tmp_path).origin == "aime24.jsonl"
    with pytest.raises(UserError, match=r"which file is math500\? candidates: none"):
        prepare("math500", local=tmp_path / "many", out=tmp_path)
    contest(tmp_path / "hub" / "data" / "test.jsonl")
    contest(tmp_path / "hub" / "data" / "train.jsonl")
    assert prepare("aime25", local=tmp_path / "hub", out=tmp_path).origin == "test.jsonl"  # its name on the hub
    with pytest.raises(UserError, match=r"which file is aime24\? candidates: test.jsonl, train.jsonl"):
        prepare("aime24", local=tmp_path / "hub", out=tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare("aime24", local=tmp_path / "nowhere", out=tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """The hub's cache on a machine without a network; returns the folder of a set at a commit in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def folder(name: str, commit: str) -> Path:
        repo = tmp_path / "cache" / f"datasets--{SOURCES[name].repo.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("f" * 40)
        return repo / "snapshots" / commit

    return folder


def test_from_the_hub_at_the_pinned_commit(tmp_path: Path, hub: Callable[[str, str], Path]) -> None:
    commit = SOURCES["aime25"].revision
    source = contest(hub("aime25", commit) / "test.jsonl")
    path = ensure("aime25", tmp_path / "data")
    assert path == tmp_path / "data" / "aime25.jsonl"
    assert read(path)[0]["source"] == "math-ai/aime25"
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    assert meta["source"] == {
        "hub": "math-ai/aime25",
        "revision": commit,
        "file": "test.jsonl",
        "sha256": sha256(source),
    }
    source.unlink()
    assert ensure("aime25", tmp_path / "data") == path  # it is there: nothing is fetched
    with pytest.raises(UserError, match=r"has no test.jsonl; with a copy at hand"):
        prepare("aime25", out=tmp_path / "data")


def test_of_several_at_once_one_fetches(
    tmp_path: Path, hub: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contest(hub("aime25", SOURCES["aime25"].revision) / "test.jsonl")
    together = threading.Barrier(8)

    def fetch(_: int) -> Path:
        together.wait()
        return ensure("aime25", tmp_path / "data")

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(8))) == {tmp_path / "data" / "aime25.jsonl"}
    assert capsys.readouterr().out.count("aime25: 30 problems") == 1


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("gpqa_diamond", "evaluate.py --benchmarks FOLDER/gpqa_diamond/gpqa_diamond.jsonl"),
        ("dapo_math_17k", "data.train=FOLDER/dapo_math_17k.jsonl"),
        ("embedded_train", "data.train=FOLDER/embedded_train.jsonl"),
        ("embedded_held_out", "evaluate.py --benchmarks FOLDER/embedded_held_out.jsonl"),
    ],
)
def test_where_nothing_can_be_written_it_says_how_a_set_is_read_elsewhere(tmp_path: Path, name: str, read: str) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(UserError) as caught:
        ensure(name, tmp_path / "data")
    assert str(caught.value).startswith(f"{path_of(name, tmp_path / 'data')} cannot be written (")
    said = f"write it elsewhere with python data/prepare.py {name} --out FOLDER, and read it there with {read}"
    assert str(caught.value).endswith(said)


def test_another_revision_is_recorded_as_its_commit(tmp_path: Path, hub: Callable[[str, str], Path]) -> None:
    dapo(hub("dapo_math_17k", "f" * 40) / "data" / "dapo-math-17k.parquet", ("One?", "1"))
    report = prepare("dapo_math_17k", out=tmp_path, revision="main")
    assert json.loads(report.path.with_suffix(".meta.json").read_text())["source"]["revision"] == "f" * 40


def test_a_hub_out_of_reach_says_what_to_do(tmp_path: Path, hub: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match=r"python data/prepare.py math500 --from PATH --out") as caught:
        ensure("math500", tmp_path / "data")
    assert "HuggingFaceH4/MATH-500" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=r"accept its terms at https://\S+/Idavidrein/gpqa and run hf auth login"
    ) as caught:
        ensure("gpqa_diamond", tmp_path / "data")
    assert "python data/prepare.py gpqa_diamond --from PATH" in str(caught.value)
    with pytest.raises(UserError, match="unknown data set 'aime23': known are aime24"):
        ensure("aime23", tmp_path / "data")


# -------------------------------------------------------------------------------------------- command line


SCRIPT = Path(__file__).parents[2] / "data" / "prepare.py"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("prepare_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["data/prepare.py", *map(str, arguments)])
        return script.main()

    return run


LONG = "How many of the first hundred positive integers have an odd number of divisors in all"
LIKE_LONG = f"Tell me: {LONG.lower()}, please."


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder with a training set of 3 questions, 1 of which stands in aime24 and 1 in GPQA, and both of these."""
    folder = tmp_path / "copies"
    contest(folder / "aime24.jsonl", problem=LONG, answer="10")
    gpqa(folder / "gpqa_diamond.csv", Question=f"{SECRET} {LONG.replace('odd', 'even')}")
    even = LIKE_LONG.replace("odd", "even")
    dapo(folder / "dapo_math_17k.parquet", (LIKE_LONG, "10"), (even.replace("Tell", "Show"), "90"), ("Two?", "2"))
    return folder


@pytest.mark.slow
def test_without_out_it_writes_beside_itself(tmp_path: Path) -> None:
    """Wherever it is started: evaluate.py looks in data/."""
    (tmp_path / "data").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "data"))
    contest(tmp_path / "copy.jsonl")
    subprocess.run(
        [sys.executable, script.name, "aime24", "--from", tmp_path / "copy.jsonl"],
        cwd=script.parent,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        check=True,
    )
    assert sorted(path.name for path in script.parent.iterdir()) == ["aime24.jsonl", "aime24.meta.json", "prepare.py"]


def test_contamination_is_reported_whichever_set_comes_last(
    tmp_path: Path, copies: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command("aime24", "--from", copies, "--out", out) == 0
    assert "contamination:" not in capsys.readouterr().out
    assert command("dapo_math_17k", "--from", copies, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "aime24       in dapo_math_17k     1 of    30, 1 with the same answer; 1 training questions" in printed
    assert "in all ... [10]" in printed
    assert command("gpqa_diamond", "--from", copies, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "gpqa_diamond in dapo_math_17k     1 of   198, 0 with the same answer; 1 training questions" in printed
    assert "aime24       in" not in printed  # neither of the two is new
    assert SECRET not in printed
    assert "have an even number" not in printed


def test_decontaminate_removes_the_training_questions(
    tmp_path: Path, copies: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # whatever the order of the names, sets for evaluation come first
    assert command("dapo_math_17k", "gpqa_diamond", "aime24", "--decontaminate", "--from", copies, "--out", out) == 0
    assert [row["question"] for row in read(out / "dapo_math_17k.jsonl")] == ["Two?"]
    printed = capsys.readouterr().out
    assert "-1  overlap aime24\n" in printed
    assert "-1  overlap gpqa_diamond\n" in printed
    assert "note: decontaminated against aime24, gpqa_diamond\n" in printed
    assert "0 of    30" in printed
    meta = json.loads((out / "dapo_math_17k.meta.json").read_text())
    assert meta["rows"] == meta["problems"] + sum(meta["dropped"].values()) == 3


def test_one_failure_does_not_stop_the_others(
    tmp_path: Path, copies: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (copies / "aime24.jsonl").unlink()
    assert command("aime24", "dapo_math_17k", "--from", copies, "--out", tmp_path / "out") == 2
    assert (tmp_path / "out" / "dapo_math_17k.jsonl").is_file()
    assert capsys.readouterr().err.startswith("error: --from")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mathh500"], "unknown data set 'mathh500': did you mean math500?"),
        (["aime24", "--decontaminate"], "--decontaminate needs a training set"),
        (["gsm8k_train", "--decontaminate"], "--decontaminate: no evaluation set"),
        (["gsm8k", "--from", __file__], "go with one set: one of gsm8k_test, gsm8k_train"),
        (["aime24", "aime25", "--revision", "main"], "--revision"),
        (["aime24", "--from", "no/such/place"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert command(*arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


def test_gsm8k_writes_both_sets(tmp_path: Path, command: Callable[..., int]) -> None:
    for name, count in (("gsm8k_train", 5), ("gsm8k_test", 3)):
        rows = [{"question": f"{name} {n}?", "answer": f"It is\n#### 1,0{n}0"} for n in range(count)]
        jsonl(tmp_path / "copies" / f"{name}.jsonl", *rows)
    assert command("gsm8k", "--from", tmp_path / "copies", "--out", tmp_path, "--any-count") == 0
    assert [row["answer"] for row in read(tmp_path / "gsm8k_test.jsonl")] == ["1000", "1010", "1020"]
    assert len(read(tmp_path / "gsm8k_train.jsonl")) == 5


def test_all_is_every_set_once_and_training_after_evaluation() -> None:
    assert set(GROUPS["all"]) == {*SOURCES, "embedded_train", "embedded_held_out"} - {"amc23_40"}
    roles = [SOURCES[name].role for name in GROUPS["all"] if name in SOURCES]
    assert roles == sorted(roles)  # "evaluation" < "train"
