"""`kvq policies`: what each policy costs."""


def policies() -> None:
    """List the policies."""
