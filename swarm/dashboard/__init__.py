"""The web page that every node serves at its own address (docs/dashboard.md)."""
