"""Descriptions of artifacts: manifests, bitfields, safetensors headers. Pure data: no files, no peers."""
