"""What holds in all tests."""

import pytest

import pictures


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Every picture is drawn, of few pixels."""
    monkeypatch.setattr(pictures, "DPI", 20)
