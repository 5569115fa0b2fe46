"""Both operands of products in eight bits: packed FP8 weights as they are, and rows rounded to FP8 for them."""
