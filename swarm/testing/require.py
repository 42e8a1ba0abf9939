"""The assertion of the contract programs: also under `python -O`, and with a promise in words."""


def require(holds: object, promise: str) -> None:
    """Raises AssertionError with the broken promise unless `holds`."""
    if not holds:
        raise AssertionError(promise)
