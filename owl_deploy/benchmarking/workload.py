"""What is timed: a prompt and greedy decoding, by one engine on one graph; and when one timing stands for another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.benchmarking.end_to_end import EndToEnd
from owl_deploy.bundle.expected import ExpectedLogits, read_expected
from owl_deploy.bundle.manifest import BundleManifest, FlavorRecord
from owl_deploy.bundle.names import Flavor, model_file
from owl_deploy.engines.probe import DECODED_TOKENS
from owl_deploy.engines.registry import EngineSpec
from owl_deploy.machine.description import cpu_model
from owl_deploy.machine.threads import available_cores
from owl_deploy.records import fingerprint

_TIMED = "prefill to the last position's logits"  # rounds whose prefill computed every position's are measured again


@dataclass(frozen=True)
class Workload:
    """What each engine is timed on: a prompt, then greedy decoding.

    Attributes:
        prompt: token ids.
        windows: evaluation windows [n, length] for perplexity, or None.
        text: where these came from.
        batch: sequences decoded side by side.
        end_to_end: what is also timed from text to text, or None.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    threads: int
    repetitions: int
    windows: NDArray[np.int64] | None
    text: str | None
    batch: int = 1
    end_to_end: EndToEnd | None = None

    @property
    def context(self) -> int:
        longest = 0 if self.windows is None else self.windows.shape[1]
        return max(len(self.prompt) + max(self.new_tokens, DECODED_TOKENS), longest)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Lengths that are prefilled."""
        return tuple(sorted({len(self.prompt)} | ({self.windows.shape[1]} if self.windows is not None else set())))

    @property
    def batched_prompts(self) -> list[list[int]]:
        """The prompt of each sequence, [batch, length]: no two alike where they may differ."""
        turns = (index % len(self.prompt) for index in range(self.batch))
        return [[*self.prompt[turn:], *self.prompt[:turn]] for turn in turns]

    def fingerprint(self) -> str:
        """Equal for workloads whose timings may stand for each other."""
        sampling = self.end_to_end.sampling if self.end_to_end else None
        return fingerprint([_TIMED, self.prompt, self.new_tokens, self.threads, self.batch, repr(sampling)])

    def checks_fingerprint(self) -> str:
        """Equal for workloads whose perplexity and parity may stand for each other."""
        return fingerprint([self.threads, None if self.windows is None else self.windows.tolist()])


@dataclass(frozen=True)
class Configuration:
    """One engine on one bundle's graph of one flavor."""

    spec: EngineSpec
    bundle: Path
    manifest: BundleManifest
    flavor: Flavor

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.bundle}"

    @property
    def graph(self) -> Path:
        return self.bundle / self.flavor / model_file(self.flavor)

    @property
    def record(self) -> FlavorRecord:
        return self.manifest.flavors[self.flavor]

    @cached_property
    def expected(self) -> ExpectedLogits | None:
        """What this engine has to compute on the graph.

        None where that is for another engine to say: the export kept nothing, or kept it of another engine's graph.

        Raises:
            UserError: the file is damaged.
        """
        return read_expected(self.graph.parent) if self.spec.checked_at_export else None

    @property
    def tokens_to_check(self) -> int:
        """Of the longest sequence that the check runs, besides the workload's own."""
        return len(self.expected.ids) if self.expected else 0

    def key(self, *more: str) -> str:
        """Equal for measurements that may stand for each other: same graph, engine and machine, and `more`.

        Of the engine that is what runs now, not what the graph was exported with.
        """
        return fingerprint([*self._what_runs, *more])

    @cached_property
    def _what_runs(self) -> list[object]:
        files = [file.sha256 for file in self.record.files]
        machine = [cpu_model(), available_cores()]
        return [self.spec.name, self.spec.what_runs(), self.flavor, files, machine]
