"""An OpenAI-compatible server: continuous batching over an ONNX Runtime session, and HTTP around it."""
