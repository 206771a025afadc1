"""A training from its last save to its end: measured on the way, saved, and stopped when it is enough."""

from __future__ import annotations

import math
import time
from pathlib import Path

from transformers import PreTrainedModel

from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.files import read_json, write_json
from owl_deploy.recovery.plan import RecoveryPlan
from owl_deploy.recovery.text import TrainingText
from owl_deploy.recovery.train import StepRecord, Trainer
from owl_deploy.reporting import Clock, Reporter

_SAVED_EVERY_S = 300


class Training:
    """A training from its last save to its end.

    Attributes:
        before, after: perplexity on the held-out windows.
        seconds: of all steps, those of earlier runs included; measurements and saves left out.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: PreTrainedModel,
        text: TrainingText,
        plan: RecoveryPlan,
        unfinished: Path,
        clock: Clock,
    ) -> None:
        self._trainer, self._model, self._text, self._plan = trainer, model, text, plan
        self._state, self._best = unfinished / "state.safetensors", unfinished / "best.safetensors"
        self._facts = unfinished / "facts.json"
        self._clock = clock
        self.before = self.after = math.nan
        self.seconds = 0.0

    def train(self, reporter: Reporter) -> None:
        """All steps that are left.

        Raises:
            Diverged: the loss is not finite.
        """
        trainer, plan = self._trainer, self._plan
        if trainer.restore(self._state):
            reporter.step(f"continuing after step {len(trainer.log)} of {plan.steps}")
            facts = read_json(self._facts)
            self.before, self.seconds = facts["before"], facts["seconds"]
        else:
            self.before = self._perplexity()
        trainer.share()
        saved = time.monotonic()
        with reporter.progress(plan.steps, "training", done=len(trainer.log)) as advance:
            while len(trainer.log) < plan.steps and not self._is_enough():
                started = time.perf_counter()
                ids = self._text.step(len(trainer.log), plan.batch, plan.seed)
                trainer.processes.from_main(ids)
                record = trainer.step(ids)
                self.seconds += time.perf_counter() - started
                if plan.is_evaluated_after(record.step):
                    self._evaluate(record, reporter)
                if time.monotonic() - saved > _SAVED_EVERY_S or self._is_last(record):
                    with self._clock.phase("keep"):
                        write_json(self._facts, {"before": self.before, "seconds": self.seconds})
                        trainer.save(self._state)
                    saved = time.monotonic()
                advance(f"loss {record.loss:.3f}, {record.tokens / self.seconds:.0f} tokens/s")
        self._clock.seconds["train"] = round(self.seconds, 3)
        if plan.patience is not None:
            trainer.restore_weights(self._best)
        self.after = self._measured()[-1] if plan.patience is None else min(self._measured())

    def take_last_save(self) -> int | None:
        """Go back to the last save, and return its step; None if there is none."""
        return len(self._trainer.log) if self._trainer.restore(self._state) else None

    def _evaluate(self, record: StepRecord, reporter: Reporter) -> None:
        record.perplexity = self._perplexity()
        reporter.step(
            f"step {record.step} of {self._plan.steps}: {record.tokens} tokens, loss {record.loss:.4f}, "
            f"perplexity {record.perplexity:.2f} on held-out text (before: {self.before:.2f})"
        )
        if self._plan.patience is not None and record.perplexity == min(self._measured()):
            self._trainer.save(self._best)

    def _perplexity(self) -> float:
        with self._clock.phase("evaluate"):
            return perplexity(self._model, self._text.held_out.ids)

    def _measured(self) -> list[float]:
        return [step.perplexity for step in self._trainer.log if step.perplexity is not None]

    def _is_enough(self) -> bool:
        """Whether the perplexity has not become better for as long as the plan's patience."""
        measured, patience = self._measured(), self._plan.patience
        return patience is not None and len(measured) > patience and min(measured) not in measured[-patience:]

    def _is_last(self, record: StepRecord) -> bool:
        return record.step == self._plan.steps
