"""Mutated bytes for all decoders of bytes from peers.

In `tests/`:

    python -m fuzz --inputs 10000000      all targets; inputs that break a target are kept
    python -m fuzz --replay FILE --target messages     a kept input again

`mutation` makes inputs, a function of a seed and a number; `targets` says what each decoder may do with them.
"""
