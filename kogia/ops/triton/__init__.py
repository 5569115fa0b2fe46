"""GPU kernels in Triton, each behind the signature of the op that it speeds up.

Every kernel here keeps the rules of the reference: statistics, scores and sums in float32, one rounding at the end.
None has a backward: they serve forward passes without gradients.
"""
