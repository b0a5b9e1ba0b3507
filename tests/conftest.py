"""Fixture of all tests."""

import pytest

import pictures


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Draw every picture, of few pixels."""
    monkeypatch.setattr(pictures, "DPI", 20)
