"""Implementations whose results for a row do not depend on the rows beside it (`kogia.ops.dispatch.batch_invariant`).

Products run over blocks of a fixed number of rows, so that they are always the same call; attention runs over fixed
pieces of a context in order; sums go from left to right. On a CPU the same function must also be the same at the end
of a tensor: PyTorch's sigmoid is another one in the vectors and in what is left over, its exp is not.
"""
