"""GPU kernels in Triton, each behind the signature of the op that it speeds up.

Every kernel here keeps the rules of the reference: statistics, scores and sums in float32, one rounding at the end.
Those of training (`adamw`, `experts`, and what is called `_training`) have a backward; the others serve forward passes
without gradients.
"""
