"""Who is acting: context variables, never a process global."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.context import acting_as, as_service, bind, current_actor, current_transaction
from equitie_data.errors import ConfigurationError, NoActorError


def test_nobody_acts_by_default() -> None:
    with pytest.raises(NoActorError, match="acting_as"):
        current_actor()
    assert current_transaction() is None


def test_an_actor_ends_with_its_block_and_blocks_nest() -> None:
    user = uuid4()
    with acting_as(user, ip_address="203.0.113.9", request_id="r1"):
        assert current_actor().user_id == user
        with as_service("refund"):
            assert current_actor().kind == "service"
            assert current_actor().user_id is None
        assert current_actor().request_id == "r1"
    with pytest.raises(NoActorError):
        current_actor()


def test_the_settings_sent_with_every_transaction() -> None:
    user = UUID("11111111-2222-3333-4444-555555555555")
    with acting_as(str(user), ip_address=" 2001:DB8::0:1 ", tenant_id="t") as actor:
        assert json.loads(actor.claims) == {"sub": str(user), "role": "authenticated"}
        assert json.loads(actor.context) == {
            "actor": "user",
            "user_id": str(user),
            "tenant_id": "t",
            "ip_address": "2001:db8::1",
        }
    with as_service("nightly") as actor:
        assert actor.claims == ""
        assert json.loads(actor.context) == {"actor": "service", "reason": "nightly"}


@pytest.mark.parametrize("user_id", ["", "1", "not-a-uuid", "1; DROP TABLE x", None])
def test_a_user_id_that_is_no_uuid_is_refused_without_repeating_it(user_id: str) -> None:
    with pytest.raises(ConfigurationError, match="user_id is not a UUID") as caught, acting_as(user_id):
        pass
    assert not user_id or f"{user_id!r}" not in str(caught.value)


@pytest.mark.parametrize("address", ["10.0.0.1:443", "1.2.3.4, 5.6.7.8", "unknown"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="ip_address"), acting_as(uuid4(), ip_address=address):
        pass


def test_a_service_needs_a_reason() -> None:
    with pytest.raises(ConfigurationError, match="reason"), as_service("  "):
        pass


@given(st.text(), st.text())
def test_whatever_a_client_sends_becomes_storable_json(agent: str, request: str) -> None:
    with acting_as(uuid4(), user_agent=agent, request_id=request) as actor:
        facts = json.loads(actor.context)
    for name in ("user_agent", "request_id"):
        value = facts.get(name, "")
        assert "\x00" not in value
        assert len(value) <= 1_000


def test_threads_have_actors_of_their_own() -> None:
    barrier = Barrier(8)

    def work(_: int) -> bool:
        mine = uuid4()
        for _ in range(200):
            with acting_as(mine):
                barrier.wait()
                if current_actor().user_id != mine:
                    return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


def test_tasks_have_actors_of_their_own() -> None:
    async def work() -> bool:
        mine = uuid4()
        with acting_as(mine):
            for _ in range(50):
                await asyncio.sleep(0)
                if current_actor().user_id != mine:
                    return False
        return True

    async def main() -> list[bool]:
        return list(await asyncio.gather(*(work() for _ in range(20))))

    assert all(asyncio.run(main()))


def test_bind_refines_the_acting_actor_or_sets_one() -> None:
    def work() -> None:
        with pytest.raises(NoActorError):
            bind(request_id="r")
        user = uuid4()
        bind(user_id=user, ip_address="10.0.0.1")
        bind(request_id="r")
        actor = current_actor()
        assert (actor.user_id, actor.ip_address, actor.request_id) == (user, "10.0.0.1", "r")
        assert json.loads(actor.context)["request_id"] == "r"

    import contextvars

    contextvars.copy_context().run(work)
    with pytest.raises(NoActorError):
        current_actor()
