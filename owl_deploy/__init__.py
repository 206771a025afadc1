"""owl-deploy: prune an LLM with OWL, export it to ONNX, measure it on a CPU."""

__version__ = "0.1.0"
