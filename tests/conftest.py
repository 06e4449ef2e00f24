import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take minutes come first: workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("interpreter") is None)
