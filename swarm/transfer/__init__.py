"""Transfer of an artifact: which chunk from which peer, and which upload next.

`scheduler`, `download`, `upload` and `superseed` are pure state machines. `download_driver` and `upload_driver` carry
out their actions over transports; `verify` hashes each chunk as it lands; `shares` holds the artifacts of a node.
"""
