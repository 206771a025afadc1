"""Work in a process of its own: what it took of memory is free when it is done, whatever libraries keep of it."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar, cast

from owl_deploy.errors import UserError, ending

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def apart(what: str, work: Callable[P, ResultT], /, *arguments: P.args, **named: P.kwargs) -> ResultT:
    """What `work` returns or raises, in another Python that ends with it. All of it has to be picklable.

    Args:
        what: is done, for the message.

    Raises:
        UserError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would begin with all that this process holds
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, arguments, named), daemon=True)
    process.start()
    theirs.close()
    try:
        done, result = ours.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"{what}: its process ended ({ending(process.exitcode or 0)}); it may need more memory than there is"
        ) from None
    finally:
        process.terminate()
        process.join()
        ours.close()
    if not done:
        raise result
    return cast(ResultT, result)


def _answer(
    answers: Connection, work: Callable[..., object], arguments: tuple[object, ...], named: dict[str, object]
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a command that it runs ends too
    try:
        answers.send((True, work(*arguments, **named)))
    except Exception as error:
        answers.send((False, error))
