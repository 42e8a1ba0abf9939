"""What is distributed, described: pure data.

`manifest` names an artifact's files, chunks and digests; `bitfield` says which chunks are held; `safetensors_header`
finds the tensors in a file. Nothing here reads a file or knows a peer.
"""
