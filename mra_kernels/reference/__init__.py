"""The definition of right: every op, the MR-Adapter and the merge in plain PyTorch, which nobody optimises.

This is what an eager user runs: library convolutions on channels-last memory, library norms and products, each in the
dtype of its input. Autograd, compilers and exporters see through it.
"""
