"""Mutated bytes for everything that reads what peers send.

In `tests/`:

    python -m fuzz --inputs 10000000      all targets; inputs that break one are kept
    python -m fuzz --replay FILE --target messages     one input again

`mutation` makes inputs, a function of a seed and a number; `targets` says what each decoder may do with them.
"""
