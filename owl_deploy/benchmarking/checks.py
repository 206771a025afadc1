"""Does an engine compute, here and now, what the checkpoint computes? Asked of every engine before it is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from owl_deploy.benchmarking.workload import Configuration, Workload
from owl_deploy.bundle.expected import ExpectedLogits
from owl_deploy.bundle.records import ParityRecord
from owl_deploy.engines.client import EngineProcess
from owl_deploy.engines.probe import DECODED_TOKENS
from owl_deploy.engines.registry import engine_spec
from owl_deploy.errors import CheckFailed, UserError
from owl_deploy.exporting.verify.parity import REFERENCES, compare, tolerance_of

Running = Callable[[Configuration], AbstractContextManager[EngineProcess]]


@dataclass
class ParityCheck:
    """Compares logits: with torch's where the export kept them for this graph, else with an engine for which it did.

    Attributes:
        configurations: all that are measured; one of them may serve as the reference of another.
        running: starts an engine, or finds it loaded.
        has_failed: whether a configuration has proved unfit as a reference.
        sound: names of configurations that computed torch's logits here.
    """

    configurations: Sequence[Configuration]
    workload: Workload
    running: Running
    has_failed: Callable[[Configuration], bool]
    timeout_s: float
    sound: set[str] = field(default_factory=set)

    def of(self, item: Configuration, process: EngineProcess) -> ParityRecord:
        """How the logits of `item`, which runs in `process`, agree.

        Raises:
            CheckFailed: the logits differ; what the engine is fast at is then not this model.
            UserError: there is nothing to compare with.
        """
        expected = item.expected
        return self._with_torch(item, process, expected) if expected else self._with_engine(item, process)

    def _with_torch(self, item: Configuration, process: EngineProcess, expected: ExpectedLogits) -> ParityRecord:
        at_once, decoded = process.logits(expected.ids.tolist(), timeout_s=self.timeout_s)
        if len(at_once) + len(decoded) != len(expected.ids):
            raise CheckFailed(
                f"{item.name}: logits differ from the checkpoint's in shape: {at_once.shape}, {decoded.shape} for "
                f"{len(expected.ids)} tokens"
            )
        is_at_once = expected.positions < len(at_once)
        parity = compare(
            expected.logits,
            at_once[expected.positions[is_at_once]],
            decoded[expected.positions[~is_at_once] - len(at_once)],
            what=item.name,
            reference="torch",
            rounded_cache=item.record.kv_cache is not None,
            tolerance=tolerance_of(item.flavor),
        )
        self.sound.add(item.name)
        return parity

    def _with_engine(self, item: Configuration, process: EngineProcess) -> ParityRecord:
        reference = self._reference(item)
        # A prompt of the length that is timed, and a few tokens after it: nothing more has to be compiled for it.
        prompt = self.workload.prompt
        ids = list(itertools.islice(itertools.cycle(prompt), len(prompt) + DECODED_TOKENS))
        actual = process.logits(ids, timeout_s=self.timeout_s)
        with self.running(reference) as reference_process:
            if reference.expected and reference.name not in self.sound:
                self._with_torch(reference, reference_process, reference.expected)
            expected = reference_process.logits(ids, timeout_s=self.timeout_s)
        return compare(
            *(np.concatenate(expected), *actual),
            what=item.name,
            reference=reference.spec.name,
            precision=item.spec.precision,
            rounded_cache=item.record.kv_cache is not None or reference.record.kv_cache is not None,
        )

    def _reference(self, item: Configuration) -> Configuration:
        """An engine on the same bundle whose graph was compared with torch, of all weights as they are.

        It is ONNX Runtime, or our own in `packed32` where that alone is measured: loaded once, it serves for both.

        Raises:
            UserError: the bundle has no graph for either, but this one's.
        """
        of_bundle = [other for other in self.configurations if other.bundle == item.bundle and other != item]
        for name in REFERENCES:
            for other in of_bundle:
                if other.spec.name == name and not self.has_failed(other):
                    return other
        spec, manifest = engine_spec("onnxruntime"), item.manifest
        flavor = next((flavor for flavor in spec.flavors if flavor in manifest.flavors), None)
        if flavor is None:
            raise UserError(
                f"{item.bundle}: lacks the graph that {item.spec.name} is compared with; add it with "
                f"owl-deploy export --flavor {spec.flavors[0]}"
            )
        if spec == item.spec:
            raise UserError(
                f"{item.bundle / flavor}: an older owl-deploy made it, without the logits that {item.spec.name} is "
                "compared with; export the model again, into another directory"
            )
        return Configuration(spec, item.bundle, manifest, flavor)
