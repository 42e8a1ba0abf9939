"""Moving one artifact: which chunk from which peer, and in which order uploads are served.

`scheduler`, `download`, `upload` and `superseed` are pure state machines. `download_driver` and `upload_driver` carry
out their actions with real transports; `verify` hashes each chunk as it lands; `shares` holds what a node offers.
"""
