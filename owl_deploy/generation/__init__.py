"""Text from a bundle: the prompt's ids, onnxruntime-genai's loop, and the text of the tokens it makes."""
