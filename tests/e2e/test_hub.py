"""Sets of the hub, by the real client libraries, from a server of our own that speaks as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.processes import run

pytestmark = pytest.mark.e2e

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """One set, owner/name, of the files in ``folder``."""

    folder: Path
    ranges = 0  # requests for a part of a file

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if file := re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.+)", path):
            self.send_file(self.folder / file[1])
        elif tree := re.fullmatch(r"/api/datasets/owner/name/tree/[^/]+/?(.*)", path):
            self.send_tree(self.folder / tree[1])
        elif path == "/ranges":
            self.send_json(Hub.ranges)
        elif re.fullmatch(r"/api/datasets/owner/name(/revision/[^/]+)?", path):
            known = {"id": "owner/name", "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": []}
            self.send_json(known | {"siblings": []})
        else:
            self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            return self.refuse("EntryNotFound")
        content = file.read_bytes()
        first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        Hub.ranges += "Range" in self.headers
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_body(part)

    def send_tree(self, folder: Path) -> None:
        if not folder.is_dir():
            return self.refuse("EntryNotFound")
        self.send_json(
            [
                {
                    "type": "directory" if each.is_dir() else "file",
                    "path": each.relative_to(self.folder).as_posix(),
                    "size": 0 if each.is_dir() else each.stat().st_size,
                    "oid": hashlib.sha1(each.name.encode()).hexdigest(),
                }
                for each in sorted(folder.iterdir())
            ]
        )

    def send_json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_body(json.dumps(value).encode())

    def send_body(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_body(b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Its address. The set has two splits, of one Parquet file each."""
    Hub.folder, Hub.ranges = tmp_path / "set", 0
    (Hub.folder / "data").mkdir(parents=True)
    table = pa.table({"problem": ["a", "b", "c"], "solved": [1, 2, None]})
    pyarrow.parquet.write_table(table, Hub.folder / "data" / "train-00000-of-00001.parquet")
    table = pa.table({"problem": ["d"], "solved": [9007199254740993]})
    pyarrow.parquet.write_table(table, Hub.folder / "data" / "test-00000-of-00001.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, os, sys
from pathlib import Path
from urllib.request import urlopen
from aipo.config.data import Source
from aipo.errors import UserError
from aipo.problems.datasets import load_problems
for keys in json.loads(sys.argv[1]):
    try:
        came = str([(p.question, p.answer) for p in load_problems(Source(**keys), split="train").problems])
    except UserError as error:
        came = str(error)
    copies = len(list(Path(os.environ["HF_HOME"]).rglob("*.parquet")))
    ranges = json.load(urlopen(os.environ["HF_ENDPOINT"] + "/ranges"))
    print(json.dumps([came, copies, ranges]))
"""


def loaded(hub: str, home: Path, *sources: dict[str, Any]) -> tuple[list[str], list[int], list[int]]:
    """What comes of each, in a process that knows no other hub; copies kept and parts asked for up to there."""
    named = {"path": "hub:owner/name", "columns": {"question": "problem", "answer": "solved"}}
    given = json.dumps([named | source for source in sources])
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    done = run([sys.executable, "-c", SCRIPT, given], env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    came, copies, ranges = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    return list(came), list(copies), list(ranges)


def test_a_set_of_the_hub(hub: str, tmp_path: Path) -> None:
    """Streaming reads where it lies, all else takes a copy first. One process: it imports for seconds."""
    came, copies, ranges = loaded(
        hub,
        tmp_path / "home",
        {"rows": 2, "streaming": True},
        {"split": "test", "streaming": True},
        {"rows": 2},
        {"split": "test"},
        {},
        {"split": "validation"},
        {"subset": "main"},
        {"path": "hub:owner/other"},
        {"columns": {}},
    )
    first, test, whole, missing, subset, unknown, columns = came[2:]
    assert came[:2] == [first, test]
    assert first == "[('a', '1'), ('b', '2')]"
    assert test == "[('d', '9007199254740993')]"
    file = f"hf://datasets/owner/name@{COMMIT}/data/train-00000-of-00001.parquet"
    assert whole == f"{file}, row 3: solved is null; fill it or remove the row"
    assert missing.startswith("hub:owner/name has no split 'validation' (there: train, test)")
    assert "BuilderConfig 'main' not found" in subset
    assert unknown.startswith("hub:owner/other cannot be read as a set of the hub (Dataset 'owner/other' doesn't exist")
    assert columns.startswith(f"{file}, row 1: no 'question' (fields there: problem, solved)")
    assert copies[1] == 0 < copies[2]
    assert 0 < ranges[1] == ranges[-1]
