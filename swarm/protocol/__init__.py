"""Every control byte that two nodes exchange: declarations, encoders and decoders, pure.

`messages` travel over links, `packets` in datagrams. Decoding checks every bound. docs/protocol.md describes both.
"""
