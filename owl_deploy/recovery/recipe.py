"""The recipe of a recovery: masked fine-tuning, as SparseML 1.8 and llm-compressor 0.14 parse it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from owl_deploy.files import write_text
from owl_deploy.models.structure import Block
from owl_deploy.pruning.recipe.write import RECIPE

_STAGE = "finetuning_stage"


def write_recipe(directory: Path, sparse: Path, blocks: Sequence[Block]) -> None:
    """Write `recipe.yaml`: the stages of the checkpoint `sparse`, if it has a recipe, and one that holds its zeros.

    Both tools keep the zeros of the parameters that a `ConstantPruningModifier` names while they train.
    """
    paths = dict.fromkeys(name for block in blocks for name in block.linears)
    targets = [f"re:.*\\.{re.escape(path)}\\.weight$" for path in paths]
    modifier = {"ConstantPruningModifier": {"targets": targets, "start": 0}}
    stage = yaml.safe_dump(
        {_STAGE: {"run_type": "train", "finetuning_modifiers": modifier}}, sort_keys=False, width=100
    )
    earlier = sparse / RECIPE
    pruned = earlier.read_text(encoding="utf-8") if earlier.is_file() else "# Written by owl-deploy.\n"
    if f"\n{_STAGE}:" not in pruned:
        pruned += f"\n# Trained further with its zeros held: owl-deploy recover; see recovery.json.\n{stage}"
    write_text(directory / RECIPE, pruned)
