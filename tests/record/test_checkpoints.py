import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.errors import UserError
from aipo.record import checkpoints
from aipo.record.checkpoints import (
    CheckpointError,
    CheckpointStore,
    compare_identity,
    damage,
    latest,
    manifest,
    resolve,
    rng_state,
    run_identity,
    set_rng_state,
)


def shard(step: int, size: int = 1000) -> Callable[[Path], None]:
    """A writer of two files, one of them in a folder of its own, filled with the step."""

    def write(folder: Path) -> None:
        (folder / "weights").mkdir()
        (folder / "weights" / "rank0.pt").write_bytes(bytes([step % 256]) * size)
        (folder / "trainer.json").write_text(json.dumps({"step": step}))

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    """A forked process, so that it can be killed; it touches files only, which is safe after a fork."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    return process


def test_a_save_is_complete_and_latest(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    assert resolve(tmp_path, "auto") is None
    saved = store.save(7, shard(7), accuracy=0.5)
    assert saved == tmp_path / "step-000007" == resolve(tmp_path, "auto") == resolve(tmp_path, str(saved))
    assert resolve(tmp_path, "none") is None
    assert manifest(saved)["step"] == 7
    files = {path: (saved / path).read_bytes() for path in ("trainer.json", "weights/rank0.pt")}
    assert {path: len(content) for path, content in files.items()} == {"trainer.json": 11, "weights/rank0.pt": 1000}
    assert manifest(saved)["files"] == {path: [len(each), zlib.crc32(each)] for path, each in files.items()}
    assert names(tmp_path) == ["best", "latest", "step-000007"]


def test_the_last_k_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, accuracy in enumerate([0.1, 0.9, None, 0.9, 0.3, None]):
        store.save(step, shard(step), accuracy=accuracy)
    assert names(tmp_path) == ["best", "latest", "step-000001", "step-000004", "step-000005"]
    assert (tmp_path / "best").read_text() == "step-000001\n"  # the earlier of two equals
    store.save(6, shard(6), accuracy=0.95)
    assert names(tmp_path) == ["best", "latest", "step-000005", "step-000006"]


def test_a_step_is_saved_once(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(3, shard(3))

    def never(folder: Path) -> None:
        raise AssertionError("written again")

    assert store.save(3, never) == tmp_path / "step-000003"


def test_rewind_forgets_the_future(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in range(4):
        store.save(step, shard(step), accuracy=step / 10)
    store.rewind(1)
    assert names(tmp_path) == ["best", "latest", "step-000000", "step-000001"]
    assert (tmp_path / "best").read_text() == (tmp_path / "latest").read_text() == "step-000001\n"
    store.rewind(-1)
    assert names(tmp_path) == []


def full_disk(folder: Path) -> None:
    (folder / "begun.json").write_text("{}")
    with open("/dev/full", "w") as file:  # the kernel answers every write here with ENOSPC
        file.write("x")


def full_disk_torch(folder: Path) -> None:
    (folder / "model.pt").symlink_to("/dev/full")
    torch.save({"weight": torch.zeros(1000)}, folder / "model.pt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", [full_disk, full_disk_torch])
def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, write):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(1, shard(1), accuracy=0.5)
    with pytest.raises(CheckpointError, match=r"step 2: .*step-000001 is intact") as caught:
        store.save(2, write, accuracy=0.9)
    assert isinstance(caught.value.__cause__, OSError | RuntimeError)
    assert names(tmp_path) == ["best", "latest", "step-000001"]
    assert damage(tmp_path / "step-000001") is None
    assert store.save(2, shard(2)).name == "step-000002"  # and the next try goes through


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(small_disk):
    store = CheckpointStore(small_disk, keep_last=5)
    for step in (1, 2, 3):
        store.save(step, shard(step, size=300_000))
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        store.save(4, shard(4, size=300_000))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert names(small_disk) == ["latest", "step-000001", "step-000002", "step-000003"]
    assert resolve(small_disk, "auto") == small_disk / "step-000003"


def test_a_failure_on_one_rank_fails_all_and_hangs_none(tmp_path):
    """Two ranks as threads; the second one's disk is full."""
    barrier = threading.Barrier(2, timeout=10)
    problems: list[Exception | None] = [None, None]
    outcomes: list[list[object]] = [[], []]

    def run(rank: int) -> None:
        def first_problem(error: Exception | None) -> str | None:
            problems[rank] = error
            barrier.wait()
            first = next((str(problem) for problem in problems if problem), None)
            barrier.wait()
            return first

        def write(step: int, folder: Path) -> None:
            (folder / f"rank{rank}.pt").write_bytes(b"x")
            if (rank, step) == (1, 2):
                raise OSError(errno.ENOSPC, "No space left on device")

        barrier.wait()
        store = CheckpointStore(tmp_path, keep_last=3, rank=rank, first_problem=first_problem)
        for step in (1, 2, 3):
            try:
                outcomes[rank].append(store.save(step, lambda folder, step=step: write(step, folder)).name)  # type: ignore[misc]
            except CheckpointError as error:
                outcomes[rank].append(str(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):  # both say what went wrong
        assert outcomes[rank][0::2] == ["step-000001", "step-000003"]
        assert "No space left" in str(outcomes[rank][1])
        assert "step-000001 is intact" in str(outcomes[rank][1])
    assert names(tmp_path) == ["latest", "step-000001", "step-000003"]
    assert names(tmp_path / "step-000003") == ["manifest.json", "rank0.pt", "rank1.pt"]


def test_all_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("rename to " + Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    CheckpointStore(tmp_path, keep_last=1).save(1, shard(1))
    named = events.index("rename to step-000001")
    assert set(events[:named]) == {
        *(f"fsync {name}" for name in ("rank0.pt", "weights", "trainer.json", "manifest.json", ".tmp-step-000001"))
    }
    parent = f"fsync {tmp_path.name}"
    assert events[named + 1 :] == [parent, f"fsync .tmp-{os.getpid()}-latest", "rename to latest", parent]


@pytest.mark.slow
def test_a_kill_before_each_change_on_disk(tmp_path, monkeypatch):
    """SIGKILL before the nth rename, fsync or removal, for every n, of a save that also prunes."""
    for n in range(1, 100):
        folder = tmp_path / str(n)
        store = CheckpointStore(folder, keep_last=1)
        store.save(1, shard(1), accuracy=0.2)
        store.save(2, shard(2), accuracy=0.1)
        calls = 0

        def die_at_nth(real, n=n):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return wrapped

        def save() -> None:
            for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
                monkeypatch.setattr(module, name, die_at_nth(getattr(module, name)))
            store.save(3, shard(3), accuracy=0.5)  # noqa: B023

        child = in_child(save)
        child.join()
        found = resolve(folder, "auto")
        assert found is not None
        assert found.name in ("step-000002", "step-000003")
        assert found == latest(folder)
        # The next process cleans up, goes back to what it found, and saves step 3 again.
        again = CheckpointStore(folder, keep_last=1)
        again.rewind(int(found.name[5:]))
        assert not [name for name in names(folder) if name.startswith(checkpoints.TEMPORARY)]
        assert damage(again.save(3, shard(3), accuracy=0.5)) is None
        assert names(folder) == ["best", "latest", "step-000003"]
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert n > 15  # the kill has met every stage


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(step, shard(step))
    os.truncate(tmp_path / "step-000003" / "weights" / "rank0.pt", 10)
    assert resolve(tmp_path, "auto") == tmp_path / "step-000002"
    assert "rank0.pt has 10 bytes, not 1000" in caplog.text
    with pytest.raises(UserError, match="10 bytes, not 1000"):
        resolve(tmp_path, str(tmp_path / "step-000003"))
    (tmp_path / "step-000002" / "trainer.json").unlink()
    (tmp_path / "step-000001" / "manifest.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged"):
        resolve(tmp_path, "auto")


@given(
    st.sampled_from(["trainer.json", "weights/rank0.pt", "manifest.json"]),
    st.sampled_from(["flipped", "cut", "removed"]),
    st.integers(0),
    st.integers(0, 7),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_whatever_is_damaged_is_named_and_the_one_before_taken(name, how, place, bit):
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = CheckpointStore(folder, keep_last=2)
        for step in (1, 2):
            store.save(step, shard(step))
        path = folder / "step-000002" / name
        content = bytearray(path.read_bytes())
        place %= len(content)
        if how == "flipped":
            content[place] ^= 1 << bit
        path.write_bytes(content[:place] if how == "cut" else content)
        if how == "removed":
            path.unlink()
        assert name in (damage(folder / "step-000002") or "nothing")
        assert resolve(folder, "auto") == folder / "step-000001"


@pytest.mark.parametrize("content", [b"", b"step-000000", b"step-\xff00002", b"step-000002/..", b"final"])
def test_a_damaged_pointer_leads_to_the_newest(tmp_path, caplog, content):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        store.save(step, shard(step))
    (tmp_path / "latest").write_bytes(content)
    assert resolve(tmp_path, "auto") == tmp_path / "step-000002"
    assert f"{tmp_path / 'latest'} is damaged" in caplog.text


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_path_that_is_no_checkpoint(tmp_path, path):
    with pytest.raises(UserError, match=r"not a complete checkpoint: .* has no manifest.json"):
        resolve(tmp_path, str(tmp_path / path))


CONFIG = {
    "model": {"name": "a"},
    "optim": {"lr": 1e-6, "betas": (0.9, 0.95)},
    "tracking": {"wandb": "auto"},
    "track": 1,
}


def identity(config, **facts):
    return run_identity(config, may_change=["tracking", "optim.steps"], **{"world_size": 2, "data": "f00", **facts})


def test_an_equal_run_resumes():
    saved = json.loads(json.dumps(identity(CONFIG)))
    assert "track" in saved  # a section that may change frees only itself
    compare_identity(saved, identity({**CONFIG, "tracking": {"wandb": "offline", "every": 3}}))


def test_every_difference_is_named():
    other = identity({"model": {"name": "b"}, "optim": {"lr": 1e-6}, "new": None, "track": 1}, world_size=4)
    with pytest.raises(UserError) as caught:
        compare_identity(identity(CONFIG), other)
    message = str(caught.value)
    assert 'model.name is "a" in the checkpoint and "b" here' in message
    assert "world_size is 2 in the checkpoint and 4 here" in message
    assert "optim.betas is [0.9, 0.95] in the checkpoint and absent here" in message
    assert "new is absent in the checkpoint and null here" in message
    assert "optim.lr" not in message
    assert "data" not in message
    assert "\n" not in message


def test_rng_state_brings_back_every_stream(tmp_path):
    def draw() -> tuple[list[float], list[float], list[float]]:
        numbers = [random.gauss(0, 1) for _ in range(3)]  # an odd number leaves a spare gauss in the state
        return numbers, np.random.randn(3).tolist(), torch.randn(3).tolist()

    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = draw()
    assert draw() != first
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first
