"""States, prefetch hints and pins over HTTP."""

from __future__ import annotations

from pathlib import Path

import msgspec

from .fakes import House, adapter_at


def load(house: House, name: str, path: Path) -> str:
    answer = house.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": adapter_at(path, name)})
    assert answer.status_code == 200
    digest: str = answer.json()["digest"]
    return digest


def test_states(house: House, tmp_path: Path) -> None:
    here, there = load(house, "acme/here", tmp_path / "a"), load(house, "there", tmp_path / "b")
    house.generator.snapshot = msgspec.structs.replace(
        house.generator.snapshot,
        residency={here: "ready", there: "loading"},
        pinned=(here,),
        loads_by_adapter={here: 3},
    )
    assert house.get("/v1/adapters").json()["data"] == [
        {
            "name": "acme/here",
            "digest": here,
            "state": "ready",
            "pinned": True,
            "loads": 3,
            "size_bytes": 4096,
        },
        {
            "name": "there",
            "digest": there,
            "state": "loading",
            "pinned": False,
            "loads": 0,
            "size_bytes": 4096,
        },
    ]


def test_prefetch_asks_for_what_the_name_stands_for(house: House, tmp_path: Path) -> None:
    digest = load(house, "acme/a", tmp_path / "a")
    answer = house.post("/v1/adapters/acme/a/prefetch", {})
    assert (answer.status_code, answer.json()["state"]) == (200, "absent")
    assert house.generator.prefetched == [digest]


def test_pins_come_and_go(house: House, tmp_path: Path) -> None:
    digest = load(house, "a", tmp_path / "a")
    assert house.post("/v1/adapters/a/pin", {}).json()["pinned"] is True
    assert house.generator.snapshot.pinned == (digest,)
    assert house.get("/v1/adapters").json()["data"][0]["pinned"] is True
    assert house.post("/v1/adapters/a/unpin", {}).json()["pinned"] is False
    assert not house.generator.snapshot.pinned


def test_what_cannot_be_moved_is_told(house: House) -> None:
    for action in ("prefetch", "pin", "unpin"):
        unknown = house.post(f"/v1/adapters/nobody/{action}", {})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        base = house.post(f"/v1/adapters/base/{action}", {})
        assert (base.status_code, base.json()["error"]["param"]) == (400, "model")
    assert house.get("/v1/adapters/a/pin").status_code == 405
    assert house.generator.prefetched == []
