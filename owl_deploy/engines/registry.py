"""The engines there are. To add one: write its module (see `protocol.py`) and give it a line here."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.bundle.names import Flavor, precision_of, sparse_flavor, weights_of
from owl_deploy.engines.environments import Environment, deciding_variables
from owl_deploy.errors import UserError
from owl_deploy.records import versions
from owl_deploy.sparse.formats import KERNELS_VARIABLE, WEIGHTS
from owl_deploy.sparse.library import library_sha256


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine.

    Attributes:
        module, class_name: where its class is.
        flavors: the graphs it runs, best first.
        environment: the virtual environment it needs; None for the one owl-deploy runs in.
        package: what its version is the version of.
        checked_at_export: its logits were compared with torch's when the graph was made. Some of these are kept beside
            the graph (see `bundle.expected`), and it is compared with them again where it is measured.
        runs_batches: it decodes several sequences side by side.
        licence: a note for the user.
    """

    name: str
    module: str
    class_name: str
    flavors: tuple[Flavor, ...]
    environment: Environment | None
    package: str
    licence: str
    checked_at_export: bool = False
    runs_batches: bool = False

    @property
    def precision(self) -> str:
        """How the weights it runs are stored."""
        return precision_of(self.flavors[0])

    def what_runs(self) -> dict[str, object]:
        """As JSON what decides, besides graph, threads and machine, what the engine computes and how fast."""
        environment = self.environment
        packages = environment.contents() if environment is not None else versions(self.package)
        runs: dict[str, object] = {"packages": packages, "variables": deciding_variables(environment)}
        if weights_of(self.flavors[0]) is not None:
            runs |= {"kernels": os.environ.get(KERNELS_VARIABLE), "library": library_sha256()}
        return runs


_GGUF: tuple[Flavor, ...] = (
    *("gguf-f16", "gguf-q8_0", "gguf-q4_0"),
    *("gguf-q4_k_m", "gguf-q3_k_m", "gguf-q2_k", "gguf-iq4_xs", "gguf-original"),
)
LLAMA_CPP = Environment(
    name="llama.cpp",
    pythons=("3.11", "3.12", "3.13", "3.10", "3.9", "3.8"),
    requirements=("llama-cpp-python==0.3.36",),
    check="import llama_cpp; llama_cpp.llama_print_system_info()",
    cmake=Path(__file__).with_name("llama_cpp.cmake"),
)

_ROUNDED_GENAI: tuple[Flavor, ...] = ("genai-int8", "genai-int4")
_OPENVINO: dict[str, tuple[Flavor, str]] = {
    "openvino": ("openvino", "OpenVinoFp32Engine"),
    "openvino-int8": ("openvino-int8", "OpenVinoEngine"),
    "openvino-int4": ("openvino-int4", "OpenVinoEngine"),
    "openvino-int8-static": ("openvino-int8-static", "OpenVinoEngine"),
    "openvino-int8-sparse": ("openvino-int8-static", "OpenVinoSparseEngine"),
}

OPENVINO = Environment(
    name="openvino",
    pythons=("3.11", "3.12", "3.13", "3.10"),
    # torch and transformers are for the conversion. optimum-intel 2.2.0 requires torchvision, whose builds on PyPI do
    # not go with a CPU build of torch.
    requirements=(
        "torch==2.13.0",
        "transformers==5.5.4",
        "optimum-intel==2.1.0",
        "nncf==3.4.0",
        "openvino==2026.4.1",
    ),
    check="import openvino, nncf, optimum.exporters.openvino",
    # Or importing it reports to its maker, through Google Analytics, unless the user has opted out.
    variables=(("CI", "true"),),
)

ENGINES = {
    spec.name: spec
    for spec in (
        EngineSpec(
            name="onnxruntime",
            module="owl_deploy.engines.onnxruntime_engine",
            class_name="OnnxRuntimeEngine",
            flavors=("genai", "standard"),
            environment=None,
            package="onnxruntime",
            licence="MIT",
            checked_at_export=True,
            runs_batches=True,
        ),
        *(
            EngineSpec(
                name=sparse_flavor(weights),
                module="owl_deploy.engines.sparse_engine",
                class_name="SparseEngine",
                flavors=(sparse_flavor(weights),),
                environment=None,
                package="onnxruntime",
                licence="Apache-2.0, ours; ONNX Runtime's is MIT",
                checked_at_export=True,
                runs_batches=True,
            )
            for weights in WEIGHTS
        ),
        *(
            EngineSpec(
                name=f"onnxruntime-{precision_of(flavor)}",
                module="owl_deploy.engines.onnxruntime_engine",
                class_name="RoundedOnnxRuntimeEngine",
                flavors=(flavor,),
                environment=None,
                package="onnxruntime",
                licence="MIT",
                runs_batches=True,
            )
            for flavor in _ROUNDED_GENAI
        ),
        *(
            EngineSpec(
                name=name,
                module="owl_deploy.engines.openvino_engine",
                class_name=class_name,
                flavors=(flavor,),
                environment=OPENVINO,
                package="openvino",
                licence="Apache-2.0",
                runs_batches=True,
            )
            for name, (flavor, class_name) in _OPENVINO.items()
        ),
        *(
            EngineSpec(
                name=name,
                module="owl_deploy.engines.torch_engine",
                class_name=class_name,
                flavors=("torch",),
                environment=None,
                package="torch",
                licence="BSD-3-Clause; transformers' is Apache-2.0",
                runs_batches=True,
            )
            for name, class_name in (("torch", "TorchEngine"), ("torch-compiled", "CompiledTorchEngine"))
        ),
        EngineSpec(
            name="deepsparse",
            module="owl_deploy.engines.deepsparse_engine",
            class_name="DeepSparseEngine",
            flavors=("standard",),
            environment=Environment(
                name="deepsparse",
                pythons=("3.11", "3.10", "3.9", "3.8"),
                requirements=("deepsparse==1.8.0", "sparsezoo==1.8.1", "setuptools<81", "numpy<2"),
                check="import numpy, deepsparse; assert int(numpy.__version__.split('.')[0]) < 2, 'numpy 2'",
                variables=(("NM_DISABLE_ANALYTICS", "1"),),
            ),
            package="deepsparse",
            licence="Neural Magic, discontinued in 2025: evaluation in development and testing, not production",
        ),
        *(
            EngineSpec(
                name=f"llama.cpp-{precision_of(flavor)}",
                module="owl_deploy.engines.llama_cpp_engine",
                class_name="LlamaCppEngine",
                flavors=(flavor,),
                environment=LLAMA_CPP,
                package="llama-cpp-python",
                licence="MIT",
                runs_batches=True,
            )
            for flavor in _GGUF
        ),
    )
}


def installed_engines(names: str, flavors: Collection[Flavor] | None = None) -> list[EngineSpec]:
    """The engines of a comma-separated list (see `named_engines`).

    One that cannot be had on this machine stays in: its rows will say so.

    Raises:
        UserError: an engine is unknown, or could be installed and is not.
    """
    specs = named_engines(names, flavors)
    for spec in specs:
        environment = spec.environment
        if environment is not None and not environment.is_ready() and environment.is_installable():
            raise UserError(f"engine {spec.name}: {environment.problem()}")
    return specs


def named_engines(names: str, flavors: Collection[Flavor] | None = None) -> list[EngineSpec]:
    """The engines of a comma-separated list, each once; `sparse` and `llama.cpp` are short for their weight formats.

    Args:
        flavors: the graphs that there are, where a short name is to mean only engines that run one of them.

    Raises:
        UserError: one is unknown.
    """
    wanted: list[EngineSpec] = []
    for name in names.split(","):
        specs = [engine_spec(full_name) for full_name in full_names(name.strip())]
        able = [spec for spec in specs if flavors is not None and not set(flavors).isdisjoint(spec.flavors)]
        wanted += able if len(specs) > 1 and able else specs
    return list(dict.fromkeys(wanted))


def environment_of(name: str) -> tuple[Environment | None, str]:
    """The environment of an engine, or of those that `name` is short for, and their licence.

    Raises:
        UserError: there is no such engine.
    """
    spec = engine_spec(full_names(name)[0])
    return spec.environment, spec.licence


def full_names(name: str) -> list[str]:
    """What `name` is short for: every engine called `name-…`, if none is called `name`."""
    longer = [engine for engine in ENGINES if engine.startswith(f"{name}-")]
    return [name] if name in ENGINES or not longer else longer


def engine_spec(name: str) -> EngineSpec:
    """The engine called `name`.

    Raises:
        UserError: there is none; those that there are, are named.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name!r} is unknown; choose from {', '.join(ENGINES)}")
    return ENGINES[name]
