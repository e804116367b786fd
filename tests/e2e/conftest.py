"""The order of the files: two workers take one after the other, so the longest come first and both end together."""

import pytest

LONGEST = [
    "train",
    "methods",
    "report",
    "evaluate",
    "embedded_model",
    "campaign",
    "soak",
    "sharding",
    "adapters",
    "failures",
    "replay",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
