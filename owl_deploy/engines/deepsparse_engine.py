"""DeepSparse 1.8.0, the paper's engine: runs in its own environment (Python <= 3.11, numpy < 2).

It compiles for static shapes only, so one `standard` graph becomes several: one that takes a single token, and one
for every length in which prompts are fed. All share one sequence length S and, through it, one cache, whose tokens
are aligned to the right. Where the graph allows, the cache is DeepSparse's own, inside the engine.

Graphs of several tokens end before the head, which is a graph of its own: of one position, which is all that a prompt
needs, and where text is scored of as many as there are tokens. So prompts and text share the bodies, which take long
to compile: 9 s each on SmolLM2-135M, 50 s at 1.1 billion weights.

A graph that its compiler cannot take ends the process, so run this in a process of its own.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from owl_deploy.bundle.names import ATTENTION_BIAS
from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.engines.static_graphs import Part, StaticGraphs
from owl_deploy.errors import UserError

_HIDDEN = np.finfo(np.float32).min
_BLOCK = 64  # tokens; DeepSparse's internal cache is made of such blocks


class DeepSparseEngine:
    """`protocol.Engine` on DeepSparse.

    Raises:
        UserError: DeepSparse is not installed in this environment, or numpy is too new for it, or the graph cannot
            be given fixed shapes.
    """

    def __init__(self, graph: Path, *, threads: int, context: int, prompts: tuple[int, ...], batch: int = 1) -> None:
        if batch != 1:
            raise UserError(f"DeepSparse's own cache holds one sequence, and the batch is {batch}")
        self._deepsparse = _import_deepsparse()
        self._graphs = StaticGraphs(graph, total=_sequence_length(context))
        if self._graphs.counts_positions:
            raise UserError(
                f"{graph}: no position_ids input, and DeepSparse's fixed shapes would give every token a wrong "
                "position; run it on onnxruntime"
            )
        self._context = context
        self._threads = threads
        # With a traced graph (OPT, GPT-NeoX, Gemma) its internal cache ends the process.
        built = self._graphs.query_groups is not None
        self._cache: _Cache = _InternalCache(self._graphs) if built else _ExternalCache(self._graphs)
        self._cache.clear()
        pieces = {piece for prompt in prompts for piece in _pieces(prompt, self._graphs.total)}
        self._engines = {piece: self._compile(piece, self._part(piece)) for piece in sorted(pieces | {1})}
        self._heads = {1: self._compile(1, "head")} if self._graphs.has_parts else {}
        self._length = 0

    def describe(self) -> dict[str, Any]:
        """Beside the protocol's facts: what share of its operators each compiled engine runs itself (0 to 1), by
        the number of tokens it takes, and whether the cache is DeepSparse's own."""
        machine = self._deepsparse.cpu.cpu_architecture()
        return {
            "version": self._deepsparse.__version__,
            "instruction_set": f"{machine.isa}_vnni" if machine.vnni else machine.isa,
            "fraction_of_supported_ops": {
                str(piece): engine.fraction_of_supported_ops for piece, engine in self._engines.items()
            },
            "prefill_logits": "last" if self._graphs.has_parts else "all",
            "internal_kv_cache": isinstance(self._cache, _InternalCache),
        }

    def prefill(self, ids: TokenIds) -> Logits:
        """See `protocol.Engine`. A length that was not among `prompts` is compiled first, in seconds.

        Raises:
            ValueError: `ids` is empty or longer than the context.
        """
        states = [self._append(piece) for piece in self._pieces_of(ids)][-1]
        logits: Logits = self._logits(states, last=True)[:, -1]
        return logits

    def score(self, ids: TokenIds) -> Logits:
        """See `protocol.Engine`, and `prefill`. A head for this length is compiled first."""
        return np.concatenate([self._logits(self._append(piece)) for piece in self._pieces_of(ids)], axis=1)

    def _pieces_of(self, ids: TokenIds) -> list[TokenIds]:
        """Begin anew; the parts of the one sequence `ids` [1, length], as they are to be appended."""
        (sequence,) = ids
        self._cache.clear()
        self._length = 0
        self._check_room(len(sequence))  # before `_pieces`, whose promise ends with the context
        return np.split(sequence, np.cumsum(_pieces(len(sequence), self._graphs.total))[:-1])

    def decode(self, tokens: TokenIds) -> Logits:
        """See `protocol.Engine`.

        Raises:
            ValueError: the context is full.
        """
        logits: Logits = self._logits(self._append(tokens))[:, 0]
        return logits

    def _append(self, ids: TokenIds) -> NDArray[np.float32]:
        """Run one piece of the sequence; the hidden states of its tokens, [1, L, D], or of a whole graph the logits."""
        new, past = len(ids), self._length
        self._check_room(new)
        engine = self._engine(new)
        feed = {
            "input_ids": np.ascontiguousarray(ids[None]),
            "position_ids": np.arange(past, past + new)[None],
            **self._visibility(past, new),
            **self._cache.inputs(new),
        }
        states = self._cache.run(engine, [feed[name] for name in engine.input_names])
        self._length = past + new
        return states

    def _logits(self, states: NDArray[np.float32], *, last: bool = False) -> NDArray[np.float32]:
        """What `_append` returned, as logits [1, positions, vocab]; `last`: the last token's will do."""
        if self._part(states.shape[1]) == "whole":
            return states
        read = np.ascontiguousarray(states[:, -1:] if last else states)
        positions = read.shape[1]
        if positions not in self._heads:
            self._heads[positions] = self._compile(positions, "head")
        logits: NDArray[np.float32] = self._heads[positions].run([read], val_inp=False)[0]
        return logits

    def _check_room(self, new: int) -> None:
        if not 0 < new <= self._context - self._length:
            raise ValueError(f"{new} tokens after {self._length} do not fit a context of {self._context}")

    def _visibility(self, past: int, new: int) -> dict[str, NDArray[Any]]:
        """Which slots of the right-aligned sequence hold tokens, and which of these each new token may look at."""
        first, total = self._graphs.total - past - new, self._graphs.total
        if self._graphs.query_groups is None:
            return {"attention_mask": (np.arange(total) >= first).astype(np.int64)[None]}
        slots, last = np.arange(total), np.arange(total - new, total)[:, None]
        bias = np.where((slots >= first) & (slots <= last), np.float32(0), _HIDDEN)
        return {ATTENTION_BIAS: np.tile(bias, (self._graphs.query_groups, 1))[None, None]}

    def _engine(self, piece: int) -> Any:
        """The engine for pieces of this length. Each holds a whole copy of the weights."""
        if piece not in self._engines:
            self._engines[piece] = self._compile(piece, self._part(piece))
        return self._engines[piece]

    def _part(self, piece: int) -> Part:
        """What of the graph an engine for pieces of this length holds."""
        return "body" if piece > 1 and self._graphs.has_parts else "whole"

    def _compile(self, piece: int, part: Part) -> Any:
        """An engine that takes `piece` tokens. Its files are gone afterwards: it keeps what it needs in memory."""
        with tempfile.TemporaryDirectory(prefix="owl-deploy-deepsparse-") as folder:
            return self._deepsparse.Engine(
                str(self._graphs.write(Path(folder), piece, part)),
                batch_size=1,
                num_cores=self._threads,
                cached_outputs=None if part == "head" else self._cache.cached_outputs,
            )


class _Cache(Protocol):
    """Keys and values of the sequence so far, and the way to run an engine that continues it."""

    cached_outputs: list[bool] | None

    def clear(self) -> None: ...

    def inputs(self, new: int) -> dict[str, NDArray[np.float32]]:
        """What an engine that takes `new` tokens is fed for its cache inputs."""

    def run(self, engine: Any, feed: list[NDArray[Any]]) -> NDArray[np.float32]:
        """Run, store the new keys and values, and return the other output: logits or hidden states, [1, L, ...]."""


class _InternalCache:
    """DeepSparse's own cache: arrays of batch 0 stand for inputs that never leave the engine."""

    def __init__(self, graphs: StaticGraphs) -> None:
        self.cached_outputs: list[bool] | None = [name in graphs.present for name in graphs.outputs]
        self._graphs = graphs

    def clear(self) -> None:
        from deepsparse.engine import LIB

        self._cache = LIB.kv_cache(0, 0)

    def inputs(self, new: int) -> dict[str, NDArray[np.float32]]:
        _, *shape = self._graphs.cache_shape(self._graphs.total - new)
        return dict.fromkeys(self._graphs.past, np.empty((0, *shape), np.float32))

    def run(self, engine: Any, feed: list[NDArray[Any]]) -> NDArray[np.float32]:
        # `Engine.run` has no way to pass the cache on; DeepSparse's own pipelines call this too.
        first: NDArray[np.float32] = engine._eng_net.execute_list_out(feed, [self._cache])[0]
        return first


class _ExternalCache:
    """Keys and values as arrays [1, heads, S, head dimension] that go in and come out at every step."""

    cached_outputs: list[bool] | None = None

    def __init__(self, graphs: StaticGraphs) -> None:
        self._graphs = graphs

    def clear(self) -> None:
        self._states = [np.zeros(self._graphs.cache_shape(self._graphs.total), np.float32)] * len(self._graphs.past)

    def inputs(self, new: int) -> dict[str, NDArray[np.float32]]:
        kept = (np.ascontiguousarray(state[:, :, new:]) for state in self._states)
        return dict(zip(self._graphs.past, kept, strict=True))

    def run(self, engine: Any, feed: list[NDArray[Any]]) -> NDArray[np.float32]:
        outputs = dict(zip(engine.output_names, engine.run(feed, val_inp=False), strict=True))
        self._states = [outputs[name] for name in self._graphs.present]
        first: NDArray[np.float32] = outputs[engine.output_names[0]]
        return first


def _sequence_length(context: int) -> int:
    """S for a context. DeepSparse's internal cache holds S rounded to whole blocks, less one token; past that it
    returns wrong logits and overwrites the heap. The second spare block lets `_pieces` halve any prompt."""
    return (context // _BLOCK + 2) * _BLOCK


def _pieces(length: int, total: int) -> list[int]:
    """The lengths in which a prompt is fed: at most two of whole blocks, then what is left.

    DeepSparse's internal cache takes only these right: above one block, a piece that is not whole blocks yields wrong
    logits or ends the process, and a piece of S / 2 or more yields NaN. On SmolLM2-135M, feeding 512 tokens in two
    halves took as long as feeding them at once without a cache.
    """
    blocks, rest = divmod(length, _BLOCK)
    first = blocks if 2 * blocks * _BLOCK < total else (blocks + 1) // 2
    pieces = [first * _BLOCK, (blocks - first) * _BLOCK, rest]
    return [piece for piece in pieces if piece]


def _import_deepsparse() -> ModuleType:
    if int(np.__version__.split(".")[0]) >= 2:
        raise UserError(f"DeepSparse returns wrong logits with numpy {np.__version__}; install numpy<2 beside it")
    os.environ["NM_DISABLE_ANALYTICS"] = "1"  # or the import looks up the country and reports to its maker
    try:
        import deepsparse
        import deepsparse.cpu
    except ImportError as error:
        raise UserError(f"DeepSparse cannot be imported ({error}); install deepsparse==1.8.0 on Python 3.11") from error
    module: ModuleType = deepsparse
    return module
