"""The Hub of a test, and clients that know no other."""

import socket
from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import HfApi, HfFileSystem

from tests.support.hub import HUB
from tests.support.hub.server import ANN, HubServer


@pytest.fixture(scope="session")
def running_hub() -> Iterator[HubServer]:
    HUB.start()
    yield HUB
    HUB.stop()


@pytest.fixture
def hub(
    running_hub: HubServer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[HubServer]:
    """An empty Hub that the clients reach as ann, with empty caches.

    The same holds for processes that a test starts.
    """
    running_hub.reset()
    cache = tmp_path_factory.mktemp("hf-home")
    switch_on(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", ANN)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    HfFileSystem.clear_instance_cache()
    yield running_hub
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of ann."""
    return HfApi()


def switch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the offline mode of all other tests, and leave no way out but to this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    look_up = socket.getaddrinfo

    def look_up_loopback(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "127.0.0.1":
            raise socket.gaierror(f"tests know no other machine, so not {host}")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_loopback)
