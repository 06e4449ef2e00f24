"""`kvq doctor`: what this machine can do."""


def doctor() -> None:
    """Check this machine."""
