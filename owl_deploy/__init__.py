"""owl-deploy: prune an LLM with OWL, export it to ONNX, measure it on a CPU."""

import os

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later report to their maker on Linux too, from the moment they are imported, and leave a file
# in the folder for temporary ones. Whoever wants that may set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
