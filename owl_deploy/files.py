"""Files on disk: written whole or not at all, hashed, and locked while in use."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
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


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file that the body writes there becomes `path`, once it is on disk.

    `path` holds either its old content or all of the new one, even after a power failure. Several processes may write
    it at once: the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a directory's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every file system can do this for directories
            raise
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    """Wait until all files in a directory and below it are on disk."""
    for path in (directory, *directory.rglob("*")):
        if path.is_dir() or path.is_file():
            _sync(path)


def cache_directory() -> Path:
    """Where owl-deploy keeps what this user can have made again."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home.absolute() / "owl-deploy"


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a corrupted one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and make it again") from error


_WRONG_PLACE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


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
        if number in _WRONG_PLACE:
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
def staged_directory(target: Path, *, manifest: str) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target` when the body ends well, and vanishes when it does not.

    `manifest` is the file that makes such a directory complete; a `target` that holds it, or anything else, is
    refused. Two processes cannot stage the same target at once. What `resumable_directory` kept for the target goes
    once the target is there.

    Raises:
        UserError: `target` cannot become that directory, or is being written by another process. If something was put
            there while the body ran, it stays, and the message names the place where the new directory is.
    """
    target = _resolved(target)
    _check_free(target, manifest)
    staging = _beside(target, "partial")
    with _parents(target), locked(target):
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
        try:
            with disk_errors(target):
                staging.mkdir()
                yield staging
                _sync_tree(staging)
                _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _check_free(target: Path, manifest: str) -> None:
    """Refuse, before any work, what a finished directory cannot take the place of."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{target}: is not a directory; choose another output directory")
    if any(target.iterdir()):
        what = "is already there" if (target / manifest).exists() else "is not empty"
        raise UserError(f"{target}: {what}; choose another output directory or remove this one")
    if target == Path.cwd() or target.is_mount():
        what = "a mount point" if target.is_mount() else "the working directory"
        raise UserError(f"{target}: is {what}, which cannot be replaced; name a new directory inside it")


def _publish(staging: Path, target: Path) -> None:
    """Let `staging` be `target`; only an empty directory is replaced, and if something else is there, both stay."""
    place, problem = target, None
    try:
        staging.rename(target)
    except OSError as error:
        problem = error
        names = (target.with_name(f"{target.name}.finished-{number}") for number in itertools.count(1))
        place = next(name for name in names if not os.path.lexists(name))
        staging.rename(place)
    _sync(place.parent)
    shutil.rmtree(_beside(target, "unfinished"), ignore_errors=True)
    if problem is not None:
        raise UserError(
            f"{target}: was changed meanwhile ({problem.strerror}) and is left as it is; what was made is in {place}"
        ) from problem


@contextlib.contextmanager
def staged_addition(target: Path) -> Iterator[Path]:
    """Yield a temporary directory; what is in it when the body ends well moves into the existing `target`.

    Files of the same name are replaced, after all else is there: so a manifest describes what it lies beside.

    Raises:
        UserError: `target` is being written by another process, or cannot be written.
    """
    target = _resolved(target)
    staging = _beside(target, "partial")
    with locked(target):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with disk_errors(target):
                staging.mkdir()
                yield staging
                _sync_tree(staging)
                for made in sorted(staging.iterdir(), key=Path.is_file):
                    if made.is_dir():
                        shutil.rmtree(target / made.name, ignore_errors=True)
                    else:
                        _sync(target)
                    made.replace(target / made.name)
                _sync(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def resumable_directory(target: Path, inputs_sha256: str) -> Iterator[Path]:
    """Yield a directory beside `target` for what is finished on the way there, of these inputs.

    An interrupted run, a killed one and one whose disk was full leave it, and the next one of the same inputs finds it.
    It goes with an error that running again would meet again; if the body ends well, `staged_directory`, which is
    around it, removes it.
    """
    kept = _beside(_resolved(target), "unfinished")
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


def _resolved(target: Path) -> Path:
    """The absolute path of what `target` names, through links too, whether it is there or not.

    Raises:
        UserError: it is the root, beside which there is nothing.
    """
    real = Path(os.path.realpath(target))
    if not real.name:
        raise UserError(f"{target}: is the root of the file system; choose another output directory")
    return real


def _beside(target: Path, kind: str) -> Path:
    """The hidden path beside a resolved target of what belongs to it."""
    return target.with_name(f".{target.name}.{kind}")


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the directories above `target`; those that were not there go again when the body fails."""
    new = [parent for parent in target.parents if not parent.exists()]
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
    """Hold `target` for this process; the lock goes when the process does, however it ends.

    Raises:
        UserError: another process, or another part of this one, holds it.
    """
    path = _beside(_resolved(target), "lock")
    # Where files cannot be locked, filelock would leave marks that outlive a killed process.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    with disk_errors(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:  # held, or on a file that its last holder has just removed
            raise UserError(f"{target}: in use by another owl-deploy; wait for it or choose another") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
