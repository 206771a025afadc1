"""Run by tests, under llm-compressor's own interpreter: print the modifiers it makes of recipe files."""

import contextlib
import json
import sys

FIELDS = (
    "sparsity", "sparsity_profile", "owl_m", "owl_lmbda", "mask_structure", "sequential_update", "targets",
    "block_size", "dampening_frac", "init_sparsity", "final_sparsity",
)  # fmt: skip

with contextlib.redirect_stdout(sys.stderr):
    from llmcompressor.recipe import Recipe

    parsed = {
        path: [
            (
                type(modifier).__name__,
                {name: getattr(modifier, name) for name in FIELDS if hasattr(modifier, name)},
            )
            for modifier in Recipe.create_instance(path).modifiers
        ]
        for path in sys.argv[1:]
    }
print(json.dumps(parsed))
