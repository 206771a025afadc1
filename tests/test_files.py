"""Outputs appear whole and on disk, and nothing that someone else put in their place is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from owl_deploy.errors import UserError
from owl_deploy.files import locked, resumable_directory, staged_addition, staged_directory, write_text, written_whole

MANIFEST = "made.json"
HOLD = """
import pathlib, sys
from owl_deploy.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def make(target: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Two files, and a finished part on the way to them."""
    with staged_directory(target, manifest=MANIFEST) as staging, resumable_directory(target, "inputs") as unfinished:
        write_text(unfinished / "part", "finished")
        write_text(staging / "weights", "weights")
        meanwhile()
        write_text(staging / MANIFEST, "{}")


def entries(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# -------------------- what someone puts there meanwhile


@pytest.mark.parametrize("was_there", [True, False])
def test_notes_that_appear_meanwhile_stay_and_the_work_is_kept_under_another_name(
    was_there: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if was_there:
        out.mkdir()

    def take_notes() -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match=r"not empty.*what was made is in .*out\.finished-1") as told:
        make(out, take_notes)
    assert len(str(told.value).splitlines()) == 1
    made = [f"out.finished-1/{name}" for name in (MANIFEST, "weights")]
    assert entries(tmp_path) == ["out", "out.finished-1", *made, "out/notes.txt"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "out.finished-1").mkdir()
    with pytest.raises(UserError, match="finished-2"):
        make(tmp_path / "out", lambda: (tmp_path / "out").write_text("mine"))
    assert (tmp_path / "out").read_text() == "mine"
    assert (tmp_path / "out.finished-2" / "weights").read_text() == "weights"


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert entries(tmp_path) == ["out", f"out/{MANIFEST}", "out/weights"]


# -------------------- names of outputs


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_leads_to_the_output(is_there: bool, tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    if is_there:
        real.mkdir(parents=True)
    make(link)
    assert link.is_symlink()
    assert entries(tmp_path) == ["disk", "disk/real", f"disk/real/{MANIFEST}", "disk/real/weights", "link"]
    with staged_addition(link) as staging:
        write_text(staging / "more", "more")
    assert (real / "more").is_file()
    assert entries(tmp_path / "disk")[0] == "real"


def test_a_link_to_itself_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match="out: is not a directory"):
        make(tmp_path / "out", pytest.fail)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (".", "here: is the working directory, which cannot be replaced; name a new directory inside it"),
        ("..", "is not empty"),
        ("/", "root of the file system"),
        ("x" * 255, "File name too long"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=told):
        make(Path(name), pytest.fail)
    assert entries(tmp_path) == ["here"]


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(UserError, match="out: is a mount point"):
        make(tmp_path / "out", pytest.fail)


def test_the_working_directory_can_be_held_and_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with locked(Path()):
        pass
    with staged_addition(Path()) as staging:
        write_text(staging / "more", "more")
    assert entries(tmp_path) == ["more"]


# -------------------- what was finished on the way


def test_what_was_finished_stays_until_the_output_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("owl_deploy.files._sync_tree", fail)
        with pytest.raises(OSError, match="Input/output error"):
            make(tmp_path / "out")
    assert ".out.unfinished/part" in entries(tmp_path)
    make(tmp_path / "out")
    assert entries(tmp_path) == ["out", f"out/{MANIFEST}", "out/weights"]


def test_what_was_finished_stays_when_the_output_is_refused(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", interrupt)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make(tmp_path / "out")
    assert ".out.unfinished/part" in entries(tmp_path)


# -------------------- on disk


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced, and what gets its name, in order."""
    events: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def named(how: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def do(path: Path, to: Path) -> Path:
            events.append(("name", to.name))
            return how(path, to)

        return do

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    return events


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, log: list[tuple[str, str]]) -> None:
    with written_whole(tmp_path / "block") as path:
        path.write_bytes(b"weights")
    assert log == [("sync", path.name), ("name", "block"), ("sync", tmp_path.name)]


def test_a_directory_is_on_disk_before_it_has_its_name(tmp_path: Path, log: list[tuple[str, str]]) -> None:
    with staged_directory(tmp_path / "out", manifest=MANIFEST) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "weights").write_bytes(b"weights")
        (staging / MANIFEST).write_text("{}")
    before = log[: log.index(("name", "out"))]
    assert {name for _, name in before} == {".out.partial", "part", "weights", MANIFEST}
    assert log[-1] == ("sync", tmp_path.name)


def test_what_a_manifest_vouches_for_is_on_disk_before_it(tmp_path: Path, log: list[tuple[str, str]]) -> None:
    with staged_addition(tmp_path) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "weights").write_bytes(b"weights")
        (staging / MANIFEST).write_text("{}")
    named = log.index(("name", "part"))
    assert ("sync", "weights") in log[:named]
    assert log[named:] == [
        ("name", "part"),
        ("sync", tmp_path.name),
        ("name", MANIFEST),
        ("sync", tmp_path.name),
    ]


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "block").write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "block") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert entries(tmp_path) == ["block"]
    assert (tmp_path / "block").read_text() == "old"


# -------------------- locks


def holder(target: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    return process


def test_a_lock_goes_with_its_process_and_leaves_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as process:
        with pytest.raises(UserError, match="in use by another owl-deploy"), locked(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert entries(tmp_path) == [".out.lock"]  # a killed process cannot remove it
        with locked(tmp_path / "out"):
            pass
    assert entries(tmp_path) == []


def test_a_lock_is_refused_to_another_part_of_the_same_process(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        with pytest.raises(UserError, match="in use"), locked(tmp_path / "out"):
            pass
        assert entries(tmp_path) == [".out.lock"]


def _count(directory: Path, times: int) -> None:
    """Add 1 to a file so many times, each time holding the lock; what is read and written is not atomic."""
    done = 0
    while done < times:
        try:
            with locked(directory / "out"):
                count = int((directory / "count").read_text())
                (directory / "count").write_text(f"{count + 1}")
                done += 1
        except UserError:
            continue


def test_no_two_processes_hold_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_count, args=(tmp_path, 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "300"
    assert entries(tmp_path) == ["count"]
