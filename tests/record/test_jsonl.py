"""Lines of JSON: on disk at once, cut at a resume, read while they are written."""

import json

import pytest
import torch

from aipo.errors import UserError
from aipo.record.jsonl import JsonlLog, iterate_jsonl, read_jsonl


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = JsonlLog(tmp_path / "m.jsonl", keep=lambda line: line["step"] <= -1)
    log.append({"step": 0, "loss": float("nan"), "reward": torch.tensor(0.5), "text": "κ"})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0, "loss": null, "reward": 0.5, "text": "κ"}\n'


@pytest.mark.parametrize("tail", ["", '{"step": 5, "rew', '{"step": 5, "κ'])
def test_resume_cuts_later_and_half_written_lines(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    log = JsonlLog(path, keep=lambda line: line["step"] <= -1)
    for step in range(5):
        log.append({"step": step})
    log.close()
    with path.open("a") as file:
        file.write(tail)
    assert [line["step"] for line in read_jsonl(path)] == [0, 1, 2, 3, 4]
    again = JsonlLog(path, keep=lambda line: line["step"] <= 2)
    again.append({"step": 3, "again": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": step} for step in range(3)),
        {"step": 3, "again": 1},
    ]
    JsonlLog(path, keep=lambda line: line["step"] <= -1)
    assert path.read_bytes() == b""


def test_a_line_cut_inside_a_character(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n' + '{"step": 1, "κ'.encode()[:-1])
    JsonlLog(path, keep=lambda line: line["step"] <= 9).append({"step": 1})
    assert [line["step"] for line in read_jsonl(path)] == [0, 1]


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "m.jsonl"
    assert [*iterate_jsonl(path)] == []  # not there
    path.write_text('{"step": 0}\n\n{"step": 1}\n{"step"\n')
    lines = iterate_jsonl(path)
    assert [next(lines), next(lines)] == [{"step": 0}, {"step": 1}]  # what comes later is not looked at yet
    with pytest.raises(UserError, match=r"m\.jsonl, row 4 is damaged"):
        next(lines)
    path.write_text('{"step": 0}\n{"step"\n')
    with pytest.raises(UserError, match=r"m\.jsonl, row 2 is damaged"):
        JsonlLog(path)
