"""Files on disk: written whole or not at all, hashed, and locked while in use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from owl_deploy.errors import DiskError, UserError


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:
    """`hashlib.file_digest` for Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a corrupted one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and make it again") from error


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free_bytes = shutil.disk_usage(_existing_parent(target)).free
            reason = f"{os.strerror(number)}, {free_bytes / 2**20:.0f} MiB free"
            raise DiskError(f"{target}: cannot be written ({reason}); make room and run it again") from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR):
            raise DiskError(f"{target}: cannot be written ({os.strerror(number)}); choose another place") from error
        raise


def _errno(error: OSError | SafetensorError) -> int | None:
    """The operating system's error number, which safetensors only tells in words."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.resolve().parents) if parent.exists())


@contextlib.contextmanager
def staged_directory(target: Path, *, manifest: str, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target` when the body ends well, and vanishes when it does not.

    `manifest` is the file that makes such a directory complete: an existing `target` that holds it, or that
    holds anything else, is refused unless `replace`. Two processes cannot stage the same target at once.

    Raises:
        UserError: `target` exists, is being written by another process, or cannot be written.
    """
    if target.exists() and not replace and (not target.is_dir() or any(target.iterdir())):
        what = "is already there" if (target / manifest).exists() else "is not empty"
        raise UserError(f"{target}: {what}; choose another output directory or remove this one")
    staging = target.with_name(f".{target.name}.partial")
    with _parents(target), locked(target):
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
        try:
            with disk_errors(target):
                staging.mkdir()
                yield staging
                if target.exists():
                    shutil.rmtree(target)
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_addition(target: Path) -> Iterator[Path]:
    """Yield a temporary directory; what is in it when the body ends well moves into the existing `target`.

    Files of the same name are replaced, after all else is there: so a manifest describes what it lies beside.

    Raises:
        UserError: `target` is being written by another process, or cannot be written.
    """
    staging = target.with_name(f".{target.name}.partial")
    with locked(target):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with disk_errors(target):
                staging.mkdir()
                yield staging
                for made in sorted(staging.iterdir(), key=Path.is_file):
                    if made.is_dir():
                        shutil.rmtree(target / made.name, ignore_errors=True)
                    made.replace(target / made.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def resumable_directory(target: Path, inputs_sha256: str) -> Iterator[Path]:
    """Yield a directory beside `target` for what is finished on the way there, of these inputs.

    It goes when the body ends well, or with an error that running again would meet again. An interrupted run, a killed
    one and one whose disk was full leave it, and the next one of the same inputs finds it.
    """
    kept = target.with_name(f".{target.name}.unfinished")
    made_for = kept / "inputs_sha256"
    with disk_errors(target):
        if kept.exists() and not (made_for.is_file() and made_for.read_text(encoding="utf-8") == inputs_sha256):
            shutil.rmtree(kept)
        kept.mkdir(exist_ok=True)
        write_text(made_for, inputs_sha256)
    try:
        yield kept
    except BaseException as error:
        in_vain = isinstance(error, UserError) and not isinstance(error, DiskError)
        if in_vain or list(kept.iterdir()) == [made_for]:
            shutil.rmtree(kept, ignore_errors=True)
        raise
    shutil.rmtree(kept, ignore_errors=True)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the directories above `target`; those that were not there go again when the body fails."""
    new = [parent for parent in target.absolute().parents if not parent.exists()]
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process has put something there
            for parent in new:
                parent.rmdir()
        raise


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target` for this process; the lock goes when the process does, however it ends."""
    lock_path = target.with_name(f".{target.name}.lock")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_path.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = lock_path.exists() and os.fstat(lock.fileno()).st_ino == lock_path.stat().st_ino
        except BlockingIOError:
            held = False
        if not held:  # or held on a file that its last holder has just removed
            raise UserError(f"{target}: in use by another owl-deploy; wait for it or choose another")
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)
