"""Which replicas may be read, which node takes writes, and who holds connections too long.

A replica is ejected at its first failure and readmitted after a good probe. Probes run in a thread of their own, on
connections of their own: a pool that is exhausted or empty must not look like a node that is down.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import attrs

from equitie_data._log import get_logger
from equitie_data.errors import UnavailableError
from equitie_data.hooks import Leaked, NodeEjected, NodeReadmitted, PrimaryChanged
from equitie_data.routing import NodeReport, ReplicaHealth, choose_primary

if TYPE_CHECKING:
    from collections.abc import Callable

    from equitie_data.hooks import Hooks
    from equitie_data.nodes import Node
    from equitie_data.settings import Settings

__all__ = ["HealthWatch"]

log = get_logger(__name__)

_TICK = 1.0  # seconds between two looks at the pools


class HealthWatch:
    """Watches over nodes.

    Args:
        nodes: The primary, then the replicas.
        settings: How often, and what counts as held too long.
        hooks: Who hears of it.
        promote: Called with a node that has become the primary.
    """

    def __init__(self, nodes: list[Node], settings: Settings, hooks: Hooks, promote: Callable[[Node], None]) -> None:
        self._nodes = nodes
        self._settings = settings
        self._hooks = hooks
        self._promote = promote
        self._due = dict.fromkeys(nodes, 0.0)
        self._reports: dict[Node, NodeReport | None] = dict.fromkeys(nodes)
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="equitie-health", daemon=True)

    def start(self) -> None:
        """Find out which node is what, then go on probing.

        With replicas, the first look ends before this returns: a DSN may name a primary that a promotion has left
        behind, and nothing must be written there.
        """
        if len(self._nodes) > 1:
            self._look()
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop probing, waiting at most ``timeout`` seconds for a probe under way."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def eject(self, node: Node, reason: str) -> None:
        """Give a replica no more reads until a probe finds it well."""
        was_ejected = node.health.ejected
        node.health = node.health.failed(time.monotonic())
        self._wake.set()
        if not was_ejected:
            log.warning("equitie_data.node_ejected", node=node.name, reason=reason)
            self._hooks.emit(NodeEjected(node=node.name, reason=reason))

    def suspect(self, node: Node | None = None) -> None:
        """Have a node probed at once, or all of them."""
        for each in self._nodes if node is None else [node]:
            self._due[each] = 0.0
        self._wake.set()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self._look()
            except Exception:  # the watch must outlive whatever it trips over
                log.exception("equitie_data.health_watch_failed")
            if not self._stopping:
                now = time.monotonic()
                next_due = min(self._due_at(node) for node in self._nodes)
                self._wake.wait(min(max(next_due - now, 0.05), _TICK))

    def _look(self) -> None:
        due = [node for node in self._nodes if self._due_at(node) <= time.monotonic()]
        primary = next(node for node in self._nodes if node.role == "primary")
        self._ask_all(due)
        if due and not self._fits(primary):
            # The primary is away: has another taken over?
            rest = [node for node in self._nodes if node not in due]
            self._ask_all(rest)
            due += rest
        if due:
            self._elect(primary)
            for node in due:
                self._note(node)
        for node in self._nodes:
            node.sweep(self._settings.max_idle)
            node.settle()
            self._report_leaks(node)

    def _ask_all(self, nodes: list[Node]) -> None:
        """Ask several at once: one that does not answer must not hold up the others."""
        if len(nodes) == 1:
            self._ask(nodes[0])
        elif nodes:
            with ThreadPoolExecutor(len(nodes), "equitie-probe") as threads:
                list(threads.map(self._ask, nodes))

    def _due_at(self, node: Node) -> float:
        return min(self._due[node], node.health.probe_at) if node.health.ejected else self._due[node]

    def _fits(self, primary: Node) -> bool:
        report = self._reports[primary]
        return report is not None and not report.in_recovery

    def _ask(self, node: Node) -> NodeReport | None:
        # Jitter keeps many processes from probing in step; a node that is away is asked again soon.
        self._due[node] = time.monotonic() + self._settings.health_check_interval * random.uniform(0.9, 1.1)  # noqa: S311
        try:
            report = node.probe()
        except UnavailableError as error:
            if node.reachable:
                log.warning("equitie_data.node_unreachable", node=node.name, role=node.role, error=str(error))
            node.reachable = False
            self._due[node] = min(self._due[node], time.monotonic() + 1.0)
            self._reports[node] = None
            return None
        node.reachable = True
        node.system = report.system
        self._reports[node] = report
        return report

    def _elect(self, current: Node) -> None:
        chosen = self._nodes[choose_primary(self._nodes.index(current), [self._reports[node] for node in self._nodes])]
        if chosen is not current:
            log.warning("equitie_data.primary_changed", before=current.name, now=chosen.name)
            current.role, chosen.role = "replica", "primary"
            current.health = ReplicaHealth(ejected=True)
            chosen.health = ReplicaHealth()
            self._promote(chosen)
            self._hooks.emit(PrimaryChanged(before=current.name, now=chosen.name))

    def _note(self, node: Node) -> None:
        """Turn a node's report into its health."""
        report = self._reports[node]
        if node.role == "primary":
            return
        if report is None or not report.in_recovery:
            # Out of recovery without being the primary: a node that was left behind by a promotion, or split off.
            self.eject(node, "probe failed" if report is None else "neither standby nor the primary")
            return
        primary = next((self._reports[each] for each in self._nodes if each.role == "primary"), None)
        behind = 0 if primary is None else max(primary.position - report.position, 0)
        was_ejected = node.health.ejected
        node.know_replayed(report.position)
        # On an idle primary the last transaction grows old although nothing is missing.
        age = report.replay_age if behind else 0.0
        node.health = ReplicaHealth(lag_seconds=age, lag_bytes=behind, timeline=report.timeline)
        if was_ejected:
            log.info("equitie_data.node_readmitted", node=node.name)
            self._hooks.emit(NodeReadmitted(node=node.name))

    def _report_leaks(self, node: Node) -> None:
        for holder in node.held_longer_than(self._settings.leak_threshold):
            event = Leaked(
                node=node.name,
                name=holder.name,
                thread=str(holder.thread),
                seconds=time.monotonic() - holder.since,
                site=holder.site(),
            )
            log.warning("equitie_data.connection_held", **attrs.asdict(event))
            self._hooks.emit(event)
