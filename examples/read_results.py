"""List what a benchmark measured: the fastest rows first, with the perplexity of each.

Run it: python examples/read_results.py RESULTS.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

from owl_deploy.benchmarking.rows import read_rows


def main(results: Path) -> None:
    rows = [row for row in read_rows(results) if row.decode_ms_p50 is not None]
    for row in sorted(rows, key=lambda row: (row.prompt_tokens, row.decode_ms_p50 or 0.0)):
        perplexity = "–" if row.perplexity is None else f"{row.perplexity:.2f}"
        print(
            f"{row.engine:20} {row.sparsity:6.1%}  prompt {row.prompt_tokens:5}  "
            f"{row.decode_ms_p50:8.2f} ms/token  perplexity {perplexity}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
