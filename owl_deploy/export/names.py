"""Names that graphs and the engines reading them agree on; standard library only, for the engines' sake."""

ATTENTION_BIAS = "attention_bias"
"""The tensor every layer of a built graph adds to its attention scores, [B, 1, G * L, S], where G is the number of
query heads to a key-value head: 0 where a query may look, else a huge negative number. It is the Concat of G equal
masks. Nothing else in the graph reads the attention mask, so an engine may cut the graph here."""
