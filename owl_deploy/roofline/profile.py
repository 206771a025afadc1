"""What each operator takes while a token is decoded, as ONNX Runtime's own profile tells it.

Matrices timed alone would not do: what is read over and over in a loop is read from a cache, and the engine's threads
are not ours. Here every matrix is read when its turn comes, after all the others, by the threads that always read it.
The engine runs in this process, for the profile's sake; what a whole token takes is measured elsewhere, unprofiled.

ONNX Runtime describes an operator's inputs, outputs and threads before it stops the operator's clock: 5 to 15 us each,
a fifth of a small model's token. A Shape or a Sub of one number takes next to nothing else, so the shortest operator
of the graph is taken for this cost, and every operator is relieved of it.
"""

from __future__ import annotations

import bisect
import importlib
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owl_deploy.engines.probe import timed_generation
from owl_deploy.engines.registry import EngineSpec

_RUN, _NODE_SUFFIX = "model_run", "_kernel_time"  # what ONNX Runtime calls the events
_US_PER_MS = 1e3


@dataclass(frozen=True)
class Profile:
    """A decoded token, operator by operator.

    Attributes:
        node_ms: what each node of the graph takes, the median over tokens, without the profile's cost. Sums of these
            are sums of medians, so that parts add up to a whole.
        operators: the operator that each node is.
        cost_ms: of the profile, for each node.
        between_ms: the median of what a token took beside its nodes.
        token_ms: the median of what it took altogether, with the profile's costs.
    """

    node_ms: dict[str, float]
    operators: dict[str, str]
    cost_ms: float
    between_ms: float
    token_ms: float

    def of(self, nodes: Iterable[str]) -> float | None:
        """Milliseconds of these nodes together; None if the profile lacks one: the engine merged it with another."""
        times = [self.node_ms.get(node) for node in nodes]
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None


def profile_decode(
    spec: EngineSpec, graph: Path, prompt: Sequence[int], *, new_tokens: int, warm_up_tokens: int, threads: int
) -> Profile:
    """Decode `new_tokens` tokens after `prompt` in this process, once the engine is warm."""
    engine_class = getattr(importlib.import_module(spec.module), spec.class_name)
    with tempfile.TemporaryDirectory(prefix="owl-deploy-") as folder:
        context = len(prompt) + max(new_tokens, warm_up_tokens)
        engine = engine_class(graph, threads=threads, context=context, profile=Path(folder) / "profile")
        timed_generation(engine, np.array([prompt], np.int64), warm_up_tokens)
        timed = timed_generation(engine, np.array([prompt], np.int64), new_tokens)
        events = json.loads(engine.end_profile().read_bytes())
    return decoded(events, timed.decode_ms)


def decoded(events: Sequence[Mapping[str, Any]], token_ms: Sequence[float]) -> Profile:
    """The profile of the last runs of the model, one for each of these tokens."""
    starts = sorted(int(event["ts"]) for event in events if event["name"] == _RUN)[-len(token_ms) :]
    between_ms = list(token_ms)
    samples_ms: dict[str, list[float]] = defaultdict(list)
    operators: dict[str, str] = {}
    for event in events:
        name: str = event["name"]
        token = bisect.bisect_right(starts, int(event["ts"])) - 1
        if event["cat"] == "Node" and name.endswith(_NODE_SUFFIX) and token >= 0:
            node, taken_ms = name.removesuffix(_NODE_SUFFIX), int(event["dur"]) / _US_PER_MS
            operators[node] = event["args"]["op_name"]
            samples_ms[node].append(taken_ms)
            between_ms[token] -= taken_ms
    raw_ms = {node: statistics.median(samples) for node, samples in samples_ms.items()}
    cost_ms = min(raw_ms.values())
    node_ms = {node: taken_ms - cost_ms for node, taken_ms in raw_ms.items()}
    return Profile(node_ms, operators, cost_ms, statistics.median(between_ms), statistics.median(token_ms))


def by_operator(profile: Profile, without: Iterable[str]) -> dict[str, float]:
    """Milliseconds of a token in each kind of operator, but for the nodes `without`; the longest first."""
    left_out = set(without)
    taken: dict[str, float] = defaultdict(float)
    for node, operator in profile.operators.items():
        if node not in left_out:
            taken[operator] += profile.node_ms[node]
    return dict(sorted(taken.items(), key=lambda item: -item[1]))
