"""Clients of the Hub of a test."""

import pytest
from huggingface_hub import HfApi

from tests.support.hub.server import HubServer


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of ann."""
    return HfApi()
