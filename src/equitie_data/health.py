"""Which replicas may be read: ejected at the first failure, readmitted after a good probe."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import structlog

from equitie_data.errors import UnavailableError
from equitie_data.hooks import NodeEjected, NodeReadmitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equitie_data.hooks import Hooks
    from equitie_data.nodes import Node

__all__ = ["HealthWatch"]

log = structlog.get_logger(__name__)


class HealthWatch:
    """Probes nodes from a thread of its own, on connections of its own.

    Args:
        nodes: What to watch.
        interval: Seconds between two probes of a node that is well.
        hooks: Who hears of ejections.
    """

    def __init__(self, nodes: Sequence[Node], interval: float, hooks: Hooks) -> None:
        self._due = dict.fromkeys(nodes, 0.0)
        self._interval = interval
        self._hooks = hooks
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="equitie-health", daemon=True)

    def start(self) -> None:
        """Start probing; the first probes run at once."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop probing, waiting at most ``timeout`` seconds for a probe under way."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def eject(self, node: Node, reason: str) -> None:
        """Give a replica no more reads until a probe finds it well."""
        was_ejected = node.health.ejected
        node.health = node.health.failed(time.monotonic())
        self._wake.set()
        if not was_ejected:
            log.warning("equitie_data.node_ejected", node=node.name, reason=reason)
            self._hooks.emit(NodeEjected(node=node.name, reason=reason))

    def _run(self) -> None:
        while not self._stopping:
            for node in self._due:
                if self._due_at(node) <= time.monotonic() and not self._stopping:
                    self._probe(node)
                    # Jitter keeps many processes from probing in step.
                    self._due[node] = time.monotonic() + self._interval * random.uniform(0.9, 1.1)  # noqa: S311
            self._wake.wait(max(min(map(self._due_at, self._due)) - time.monotonic(), 0.05))
            self._wake.clear()

    def _due_at(self, node: Node) -> float:
        return min(self._due[node], node.health.probe_at) if node.health.ejected else self._due[node]

    def _probe(self, node: Node) -> None:
        try:
            _, lag = node.probe()
        except UnavailableError as error:
            node.reachable = False
            if node.role == "replica":
                self.eject(node, "probe failed")
            else:
                log.warning("equitie_data.primary_unreachable", node=node.name, error=str(error))
            return
        was_ejected = node.health.ejected
        node.reachable = True
        node.health = node.health.probed(lag)
        if was_ejected:
            log.info("equitie_data.node_readmitted", node=node.name)
            self._hooks.emit(NodeReadmitted(node=node.name))
