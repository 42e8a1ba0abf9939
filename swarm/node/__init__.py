"""The node, and how other programs of its machine find and ask it."""
