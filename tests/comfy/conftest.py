"""The real hosts as fixtures; `hosts.py` says where they are found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # this folder's helper modules: hosts.py, serving.py

from hosts import Host, host_or_skip


@pytest.fixture(scope="session")
def host() -> Host:
    return host_or_skip("current")


@pytest.fixture(scope="session")
def older_host() -> Host:
    return host_or_skip("older")
