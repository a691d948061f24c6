"""Fused kernels and the autograd functions around them.

    cpu.cpp, cpu.py     one-pass CPU kernels, compiled at first use where there is a C++ compiler
    fused_experts.py    the expert layer as one autograd function on top of them

Every kernel has a plain torch twin that is obviously right; nothing here is needed for a right result, only for a
fast one. `moestro doctor` says what is active and why.
"""
