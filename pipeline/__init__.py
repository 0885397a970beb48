"""The story: a model in, the best checkpoint under an exact memory budget out.

Light on purpose: importing this package imports neither torch nor transformers.
"""
