"""Run by tests, under SparseML's own interpreter: print the modifiers that SparseML makes of recipe files."""

import contextlib
import json
import sys

FIELDS = (
    "sparsity", "sparsity_profile", "owl_m", "owl_lmbda", "mask_structure", "sequential_update", "targets",
    "block_size", "dampening_frac", "init_sparsity", "final_sparsity",
)  # fmt: skip

with contextlib.redirect_stdout(sys.stderr):
    from sparseml.core.framework import Framework
    from sparseml.core.recipe import Recipe

    parsed = {
        path: [
            (
                type(modifier).__name__.removesuffix("PyTorch"),
                {name: getattr(modifier, name) for name in FIELDS if hasattr(modifier, name)},
            )
            for stage in Recipe.create_instance(path).create_modifier(Framework.pytorch)
            for modifier in stage.modifiers
        ]
        for path in sys.argv[1:]
    }
print(json.dumps(parsed))
