"""Hashing: turns a chunk's bytes into the digest that its manifest names.

One module per place where the bytes may lie: `cpu` hashes host memory. All of them compute the same function, which
`manifest.py` defines; none of them knows stores, peers or files.
"""
