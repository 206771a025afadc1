"""owl-deploy: prune an LLM with OWL, export it to ONNX, and measure what the sparsity buys on a CPU.

`prune`, `recover`, `evaluate`, `export`, `bench`, `serve` and `load_bundle` do what the commands of these names do; see
`owl_deploy.api`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later report to their maker on Linux too, from the moment they are imported, and leave a file
# in the folder for temporary ones. Whoever wants that may set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from owl_deploy.api import Bundle, bench, evaluate, export, load_bundle, prune, recover, serve
    from owl_deploy.benchmarking.rows import Row
    from owl_deploy.benchmarking.run import Request
    from owl_deploy.errors import CheckFailed, UserError
    from owl_deploy.generation.model import Sampling
    from owl_deploy.pruning.plan import NM, PruningPlan
    from owl_deploy.pruning.run import Calibration, Evaluation, Execution
    from owl_deploy.recovery.plan import RecoveryPlan
    from owl_deploy.reporting import Reporter

# What is imported on first use, and from where: torch and transformers take seconds, `owl-deploy --help` none.
_HOMES = {
    "api": ("Bundle", "bench", "evaluate", "export", "load_bundle", "prune", "recover", "serve"),
    "benchmarking.rows": ("Row",),
    "benchmarking.run": ("Request",),
    "errors": ("CheckFailed", "UserError"),
    "generation.model": ("Sampling",),
    "pruning.plan": ("NM", "PruningPlan"),
    "pruning.run": ("Calibration", "Evaluation", "Execution"),
    "recovery.plan": ("RecoveryPlan",),
    "reporting": ("Reporter",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "NM",
    "Bundle",
    "Calibration",
    "CheckFailed",
    "Evaluation",
    "Execution",
    "PruningPlan",
    "RecoveryPlan",
    "Reporter",
    "Request",
    "Row",
    "Sampling",
    "UserError",
    "bench",
    "evaluate",
    "export",
    "load_bundle",
    "prune",
    "recover",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
