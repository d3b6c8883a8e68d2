"""The files that take longest begin first, so that the others fill the time beside them"""

import pytest

LONGEST = (
    "test_readme.py",
    "test_real_data.py",
    "test_story.py",
    "test_notebooks.py",
    "test_fraud_train.py",
    "test_serve_live.py",
    "test_fraud_replay.py",
    "test_promote.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Sorts the files; the tests of a file keep their order."
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
