"""Mutated bytes for everything that reads what peers send.

    python -m tests.fuzz --inputs 10000000      all targets; inputs that break one are kept
    python -m tests.fuzz --replay FILE --target messages     one input again

`mutation` makes inputs, a function of a seed and a number; `targets` says what each decoder may do with them.
"""
