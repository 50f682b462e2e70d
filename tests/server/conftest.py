"""Fixtures for the server's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from .fakes import House, adapter_at, build


@pytest.fixture
def house() -> House:
    return build()


@pytest.fixture
def poet(house: House, tmp_path: Path) -> str:
    """An adapter that is loaded as `poet`; its digest."""
    response = house.post(
        "/v1/load_lora_adapter", {"lora_name": "poet", "lora_path": adapter_at(tmp_path / "poet", "verse")}
    )
    assert response.status_code == 200, response.text
    digest: str = response.json()["digest"]
    return digest
