"""Fused kernels and the autograd functions around them.

    cpu.cpp, cpu.py     one-pass CPU kernels, compiled at first use where there is a C++ compiler
    experts.cpp         the expert layer's arithmetic, on the matrix products of products.h
    numbers.h           float and bfloat16 for both
    fused_experts.py    the expert layer as one autograd function
    gpu/                the expert layer and the router in Triton

Every kernel has a plain torch twin that is obviously right; nothing here is needed for a right result, only for a
fast one. `moestro doctor` says what is active and why.
"""
