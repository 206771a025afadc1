"""Run a command, and say how long it took and the most memory it held, as `/usr/bin/time -v` does.

python benchmarks/peak_memory.py COMMAND ARGUMENT…
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time


def main() -> None:
    start = time.perf_counter()
    code = subprocess.run(sys.argv[1:], check=False).returncode
    minutes = (time.perf_counter() - start) / 60
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_gib = used.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    print(f"{minutes:.1f} minutes, {used.ru_utime / 60:.1f} of them computing; peak RSS {peak_gib:.2f} GiB")
    sys.exit(code)


if __name__ == "__main__":
    main()
