"""Triton kernels for packed weights, and what they read: imported lazily, so Triton is wanted on a GPU only.

layout.py       codes as kernels read them, at every width
block_weight.py, trellis_weight.py     a matrix in that layout; `KERNEL_WEIGHTS` in weights.py has one for each kind
reference.py    what the kernels compute, in plain torch
decode.py       the parts that kernels share; dequantize.py, matvec.py, matmul.py, trellis.py are kernels of
                products; viterbi.py, scale_search.py, column_feedback.py of what finds the codes
configs.py      tile sizes, by card
switch.py       off for good, with one warning, where Triton does not work
"""
