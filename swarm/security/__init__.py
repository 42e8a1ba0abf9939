"""Who may join and what strangers can cost: keys, certificates, sealed datagrams, rate limits (SECURITY.md)."""
