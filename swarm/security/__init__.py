"""Membership and its enforcement: keys, certificates, sealed datagrams, rate limits (SECURITY.md)."""
