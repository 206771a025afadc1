"""Work in a process of its own: its result, its errors, its end, and the same files as without it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from owl_deploy.errors import UnsupportedFamily, UserError
from owl_deploy.exporting.apart import apart


def add(one: int, other: int) -> tuple[int, int]:
    return one + other, os.getpid()


def refuse(family: str) -> None:
    raise UnsupportedFamily(f"{family} is not written")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_result_is_that_of_another_process() -> None:
    total, pid = apart("adding", add, 2, other=3)
    assert total == 5
    assert pid != os.getpid()


def test_what_it_raises_is_raised_here() -> None:
    with pytest.raises(UnsupportedFamily, match="bloom is not written"):
        apart("writing", refuse, "bloom")


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(UserError, match=r"writing: its process ended \(signal SIGKILL\); it may need more memory"):
        apart("writing", be_killed)


def test_a_large_model_has_its_peers_written_apart_and_they_are_the_same(
    tmp_path: Path, tiny_with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from owl_deploy.bundle.manifest import read_bundle
    from owl_deploy.exporting import checkpoint, flavors
    from owl_deploy.exporting.run import export_checkpoint

    export_checkpoint(tiny_with_tokenizer, tmp_path / "here", ["gguf-q8_0", "standard"])
    written: list[str] = []

    def noted(what: str, *work: object) -> object:
        written.append(what)
        return apart(what, *work)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_LARGE_BYTES", 0)
    monkeypatch.setattr(flavors, "apart", noted)
    export_checkpoint(tiny_with_tokenizer, tmp_path / "apart", ["standard", "gguf-q8_0"])
    assert written == ["exporting gguf-q8_0"]
    here, there = (read_bundle(tmp_path / name) for name in ("here", "apart"))
    assert here.flavors == there.flavors
    assert list(there.flavors) == ["standard", "gguf-q8_0"]
