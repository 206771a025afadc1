"""What the other processes of a recovery do: every step that the main one makes."""

from __future__ import annotations

import contextlib

from owl_deploy.models.load import load_model
from owl_deploy.models.precision import fast_dtype
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.processes import Processes
from owl_deploy.recovery.teacher import Teacher
from owl_deploy.recovery.train import Diverged, Trainer
from owl_deploy.recovery.weights import what_is_trained


def help_recovery(sparse: ModelSource, dense: ModelSource, plan: RecoveryPlan, processes: Processes) -> None:
    """Train the same model with the main process, until it has no more steps; nothing is written."""
    model, teacher = load_model(sparse).float(), load_model(dense, fast_dtype(processes.device))
    model.to(processes.device)
    teacher.to(processes.device)
    what = what_is_trained(model, find_blocks(model), plan)
    trainer = Trainer(model, what, Teacher(teacher, plan), plan, processes)
    if not trainer.share():
        return
    while (ids := processes.from_main(None)) is not None:
        with contextlib.suppress(Diverged):  # the main process tells of it
            trainer.step(ids)
