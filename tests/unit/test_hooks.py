"""Subscribers hear of everything and break nothing."""

from __future__ import annotations

from equitie_data.hooks import Hook, Hooks, NodeEjected, NodeReadmitted


class Deaf:
    def on_event(self, event: object) -> None:
        raise RuntimeError("broken hook")


class Listener:
    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_event(self, event: object) -> None:
        self.heard.append(event)


def test_an_error_of_a_hook_is_counted_and_the_others_still_hear() -> None:
    listener = Listener()
    hooks = Hooks([Deaf(), listener])
    hooks.emit(NodeReadmitted(node="a"))
    assert hooks.errors == 1
    assert listener.heard == [NodeReadmitted(node="a")]
    assert isinstance(listener, Hook)


def test_hooks_come_and_go() -> None:
    hooks, listener = Hooks(), Listener()
    assert not hooks.active
    hooks.add(listener)
    assert hooks.active
    hooks.remove(listener)
    hooks.remove(listener)
    assert not hooks.active


def test_a_hook_hears_of_the_events_it_names_alone() -> None:
    class Choosy(Listener):
        event_types = (NodeEjected,)

    choosy, hooks = Choosy(), Hooks()
    hooks.add(choosy)
    assert hooks.want(NodeEjected)
    assert not hooks.want(NodeReadmitted)
    hooks.emit(NodeReadmitted(node="a"))
    hooks.emit(NodeEjected(node="a", reason="r"))
    assert choosy.heard == [NodeEjected(node="a", reason="r")]
