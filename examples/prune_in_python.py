"""Prune a model to 50%, export it, measure it beside the dense one, and let it write a sentence.

Run it: python examples/prune_in_python.py MODEL TEXT OUT [SEQLEN]
"""

from __future__ import annotations

import sys
from pathlib import Path

import owl_deploy as owl


def main(model: str, text: str, out: Path, seqlen: int = 512) -> None:
    calibration = owl.Calibration(text, samples=8, seqlen=seqlen)
    request = owl.Request(prompts=(seqlen // 2,), new_tokens=16, repetitions=2, text=text, windows=2, max_load=99)
    bundles = []
    for name, sparsity in (("dense", 0.0), ("sparse", 0.5)):
        manifest = owl.prune(model, out / name, owl.PruningPlan(sparsity, method="admm"), calibration)
        perplexity = owl.evaluate(str(out / name), text, seqlen=seqlen, windows=4)
        print(f"{name}: {manifest.sparsity_achieved:.1%} zeros, perplexity {perplexity:.2f}")
        bundles.append(owl.export(out / name, out / f"{name}-bundle", ["genai", "sparse-int8"]))
    for row in owl.bench([bundle.path for bundle in bundles], out / "results", engines="sparse-int8", request=request):
        print(f"{row.engine} at {row.sparsity:.0%}: {row.decode_ms_p50:.2f} ms a token")
    print(bundles[-1].generate("Once upon a time", chat=False, max_new_tokens=16).text)


if __name__ == "__main__":
    model, text, out, *seqlen = sys.argv[1:]
    main(model, text, Path(out), *map(int, seqlen))
