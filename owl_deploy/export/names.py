"""Names that graphs and the engines reading them agree on; standard library only, for the engines' sake."""

from typing import Literal, get_args

Flavor = Literal["standard", "genai"]
FLAVORS = get_args(Flavor)

ATTENTION_BIAS = "attention_bias"
"""The tensor every layer of a built graph adds to its attention scores, [B, 1, G * L, S], where G is the number of
query heads to a key-value head: 0 where a query may look, else a huge negative number. It is the Concat of G equal
masks. Nothing else in the graph reads the attention mask, so an engine may cut the graph here."""

OPSET = 14
"""The oldest that has every operator needed; DeepSparse reads 14 to 19."""

IR_VERSION = 8
"""DeepSparse refuses 9 and above."""
