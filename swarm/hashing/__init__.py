"""Hashing: turns a chunk's bytes into the digest that its manifest names.

`cpu` hashes host memory, `cuda` the memory of GPUs with the kernels that `kernels` loads. All compute the function that
`content.manifest` defines.
"""
