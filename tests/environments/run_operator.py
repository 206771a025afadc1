"""Run by tests, under an older ONNX Runtime's interpreter: LIBRARY, then MODEL INPUT.npy OUTPUT.npy of each product."""

import sys

import numpy as np
import onnxruntime

library, *products = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
for model, given, found in zip(products[::3], products[1::3], products[2::3], strict=True):
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    np.save(found, session.run(None, {"X": np.load(given)})[0])
print(onnxruntime.__version__)
