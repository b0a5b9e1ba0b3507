"""Fixtures of all tests."""

import os
import sys
from pathlib import Path

# One core, for children too: on networks this small, further threads would only wait.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

# No GPU either, for tests compare bits of CPUs, but for test_gpu.py, which runs alone.
if not any("test_gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from commands import go

import pictures


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Draw every picture, of few pixels."""
    monkeypatch.setattr(pictures, "DPI", 20)


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """Function from flags to the folder of their run, which is made once and only read."""
    made = {}

    def folder_of(*flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("made") / "run"
            go(made[flags], *flags)
        return made[flags]

    return folder_of
