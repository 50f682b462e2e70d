"""What a step waits for, on a device of which only the order of things is real."""

from __future__ import annotations

from collections.abc import Set
from typing import cast

import pytest
import torch

from motet.engine.gates import Gates, wait_for
from motet.memory.pool import Copies

LAYERS = 3


class Stream:
    """Work by its name, and points in streams to wait for, in the order in which they were enqueued."""

    def __init__(self, **_: object) -> None:
        self.todo: list[str | Point] = []

    def wait_event(self, event: Event) -> None:
        assert event.at is not None
        self.todo.append(event.at)


class Point:
    """What a stream had been given by then."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._length = stream, len(stream.todo)

    def is_over(self, done: Set[str]) -> bool:
        before = self._stream.todo[: self._length]
        return all(one in done if isinstance(one, str) else one.is_over(done) for one in before)


class Event:
    """A point in a stream; a later record makes it another."""

    def __init__(self, **_: object) -> None:
        self.at: Point | None = None

    def record(self, stream: Stream) -> None:
        self.at = Point(stream)


class Device:
    """Steps are launched on one stream and loads are copied on another."""

    def __init__(self) -> None:
        self.steps, self._copies = Stream(), Stream()
        self._before: dict[str, Point] = {}

    def load(self, name: str) -> Copies:
        events = [Event() for _ in range(LAYERS)]
        for layer, event in enumerate(events):
            self._copies.todo.append(f"{name}{layer}")
            event.record(self._copies)
        return cast("Copies", tuple(events))

    def launch(self, name: str, gates: Gates | None) -> None:
        """With gates each layer waits for its own."""
        for layer in range(LAYERS):
            if gates is not None:
                self.steps.wait_event(cast("Event", gates.events[layer]))
            self._before[f"{name}{layer}"] = Point(self.steps)
            self.steps.todo.append(f"{name}{layer}")

    def may_run(self, layer: str, done: str) -> bool:
        """Whether a layer of a step may run once this is done."""
        return self._before[layer].is_over(frozenset(done.split()))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.steps)
    return device


@pytest.fixture
def gates(device: Device) -> Gates:  # noqa: ARG001 - it is what they are made on
    return Gates(LAYERS)


def test_each_layer_waits_for_its_own_copies(device: Device, gates: Gates) -> None:
    gates.expect("a", device.load("a"))
    gates.hold_layers({"a", "resident"})
    device.launch("step", gates)
    assert not device.may_run("step0", "")
    assert device.may_run("step0", "a0")
    assert not device.may_run("step1", "a0 step0")
    assert device.may_run("step1", "a0 a1 step0")
    assert not device.may_run("step2", "a0 a1 step0 step1")
    assert device.may_run("step2", "a0 a1 a2 step0 step1")


def test_a_step_waits_for_no_adapter_but_its_own(device: Device, gates: Gates) -> None:
    gates.expect("a", device.load("a"))
    gates.expect("b", device.load("b"))
    gates.hold_layers({"resident"})
    device.launch("other", gates)
    assert device.may_run("other2", "other0 other1")
    gates.hold_layers({"a"})
    device.launch("first", gates)
    assert device.may_run("first0", "other0 other1 other2 a0")
    gates.hold_layers({"a", "b"})
    device.launch("second", gates)
    done = "other0 other1 other2 a0 a1 a2 first0 first1 first2"
    assert not device.may_run("second0", done)
    assert device.may_run("second0", f"{done} b0")


def test_a_step_of_two_that_come_waits_for_both(device: Device, gates: Gates) -> None:
    gates.expect("a", device.load("a"))
    gates.expect("b", device.load("b"))
    gates.hold_layers({"a", "b"})
    device.launch("step", gates)
    assert not device.may_run("step0", "a0 a1 a2")
    assert device.may_run("step0", "a0 a1 a2 b0")
    assert not device.may_run("step1", "a0 a1 a2 b0 step0")


def test_steps_behind_one_that_waited_need_not_wait_again(device: Device, gates: Gates) -> None:
    gates.expect("a", device.load("a"))
    gates.hold_layers({"a"})
    device.launch("first", gates)
    waits = len(device.steps.todo)
    gates.hold_layers({"a"})
    gates.hold_steps({"a"})
    assert len(device.steps.todo) == waits
    device.launch("decode", None)
    assert not device.may_run("decode0", "first0 first1 first2")
    assert device.may_run("decode0", "first0 first1 first2 a0 a1 a2")


def test_a_step_without_gates_waits_for_the_whole_adapter(device: Device, gates: Gates) -> None:
    gates.expect("a", device.load("a"))
    gates.expect("b", device.load("b"))
    gates.hold_steps({"a"})
    device.launch("step", None)
    assert not device.may_run("step0", "a0 a1")
    assert device.may_run("step0", "a0 a1 a2")


def test_what_left_and_came_again_is_waited_for_anew(device: Device, gates: Gates) -> None:
    gates.expect("a", device.load("a"))
    gates.hold_steps({"a"})  # as it is evicted
    device.launch("other", None)
    assert not device.may_run("other0", "")
    gates.expect("a", device.load("b"))
    gates.hold_layers({"a"})
    device.launch("step", gates)
    done = "a0 a1 a2 other0 other1 other2"
    assert not device.may_run("step0", done)
    assert device.may_run("step0", f"{done} b0")


def test_all_that_follows_waits_for_copies_to_pages_given_away(device: Device) -> None:
    wait_for(())
    device.launch("before", None)
    wait_for(device.load("a"))
    device.launch("after", None)
    assert device.may_run("before2", "before0 before1")
    done = "before0 before1 before2 a0 a1"
    assert not device.may_run("after0", done)
    assert device.may_run("after0", f"{done} a2")
