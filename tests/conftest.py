"""For all tests."""

import pytest


@pytest.fixture(autouse=True)
def pictures_are_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a test that looks at them is marked so: they take a third of a short run's time."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("metadist.pictures._save", lambda figure, path: path)
