"""Live progress over the real ASGI application: who may watch, what is sent, and that Redis carries it as well."""

import asyncio
import json
import os
import uuid

import pytest
import redis
from asgiref.sync import sync_to_async
from channels.layers import channel_layers
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.test import Client

from annotation.models import Membership
from annotation.services.leases import lease_next
from annotation.services.rankings import ranking_submit
from config.asgi import application
from tests.annotation import desk

pytestmark = pytest.mark.django_db(transaction=True)
REDIS = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379/9"


def redis_answers() -> bool:
    try:
        return bool(redis.Redis.from_url(REDIS, socket_connect_timeout=1).ping())
    except redis.RedisError:
        return False


@pytest.fixture(
    params=[
        "memory",
        pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.skipif(not redis_answers(), reason=f"no Redis answers at {REDIS}")]),
    ]
)
def layer(request):
    backends = {
        "memory": {"BACKEND": "channels.layers.InMemoryChannelLayer"},
        "redis": {"BACKEND": "channels_redis.core.RedisChannelLayer", "CONFIG": {"hosts": [REDIS], "prefix": uuid.uuid4().hex}},
    }
    before = channel_layers.backends.pop("default", None)
    configured = settings.CHANNEL_LAYERS
    settings.CHANNEL_LAYERS = {"default": backends[request.param]}
    yield request.param
    settings.CHANNEL_LAYERS = configured
    channel_layers.backends.pop("default", None)
    if before is not None:
        channel_layers.backends["default"] = before


@pytest.fixture
def project():
    project = desk.project()
    desk.prompts(project)
    return project


def socket(user=None, origin=b"http://testserver") -> WebsocketCommunicator:
    headers = [(b"origin", origin), (b"host", b"testserver")]
    if user is not None:
        client = Client()
        client.force_login(user)
        headers.append((b"cookie", f"sessionid={client.cookies['sessionid'].value}".encode()))
    return WebsocketCommunicator(application, "/ws/live/", headers=headers)


async def ask(live, slug="desk"):
    await live.send_json_to({"do": "project.watch", "project": slug})
    return await live.receive_json_from(timeout=5)


def test_nobody_watches_without_signing_in(project, layer):
    async def knock():
        return await socket().connect()

    assert asyncio.run(knock())[0] is False


def test_a_page_of_another_site_cannot_open_the_socket(project, layer):
    live = socket(desk.member(project, "ana"), origin=b"https://evil.example")

    async def knock():
        return await live.connect()

    assert asyncio.run(knock())[0] is False


def test_a_stranger_is_refused_in_the_same_words_for_any_project(project, layer):
    live = socket(desk.person("stranger"))

    async def knock():
        await live.connect()
        answers = [await ask(live, "desk"), await ask(live, "nowhere")]
        await live.disconnect()
        return answers

    here, nowhere = asyncio.run(knock())
    assert here == nowhere and here["event"] == "refused"


GARBAGE = [" ", "{", "[]", "7", "null", '{"do": "project.watch"}', '{"do": ["x"], "project": 1}', '{"do": "__class__", "project": "desk"}']
GARBAGE += ['{"do": "project.watch", "project": {"slug": "desk"}}', '{"do": "project.watch", "project": "\\u0000"}', "x" * 5000]
GARBAGE += ['{"do": "project.watch", "project": "\\ud800"}', "[" * 1990]


def test_garbage_is_refused_and_the_socket_stays_open(project, layer):
    live = socket(desk.member(project, "ana"))

    async def talk():
        await live.connect()
        events = []
        for text in GARBAGE:
            await live.send_to(text_data=text)
            events.append((await live.receive_json_from(timeout=5))["event"])
        await live.send_to(bytes_data=b"\x00\xff")
        events.append((await live.receive_json_from(timeout=5))["event"])
        last = await ask(live)
        await live.disconnect()
        return events, last["event"]

    events, last = asyncio.run(talk())
    assert set(events) == {"refused"} and last == "progress"


def test_a_member_hears_of_each_ranking_in_totals_only(project, layer):
    ana, boss = desk.member(project, "ana"), desk.member(project, "boss", "manager")
    live = [socket(ana), socket(boss)]

    def rank():
        lease = lease_next(project=project, rater=ana)
        ranking_submit(rater=ana, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))

    async def watch():
        first, then = [], []
        for one in live:
            await one.connect()
            first.append(await ask(one))
        await sync_to_async(rank)()
        for one in live:
            then.append(await one.receive_json_from(timeout=5))
            await one.disconnect()
        return first, then

    first, then = asyncio.run(watch())
    assert [one["progress"]["done"] for one in first] == [0, 0]
    assert [one["progress"]["done"] for one in then] == [1, 1]
    assert then[0] == then[1] and "ana" not in json.dumps(then) and desk.POLICY not in json.dumps(then)


def test_who_is_taken_out_of_the_project_hears_nothing_more(project, layer):
    ana, ben = desk.member(project, "ana"), desk.member(project, "ben")
    live = socket(ben)

    def rank():
        Membership.objects.filter(user=ben).delete()
        lease = lease_next(project=project, rater=ana)
        ranking_submit(rater=ana, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))

    async def watch():
        await live.connect()
        await ask(live)
        await sync_to_async(rank)()
        silent = await live.receive_nothing(timeout=1)
        await live.disconnect()
        return silent

    assert asyncio.run(watch())


def test_many_rankings_at_once_are_told_in_few_messages(project, layer):
    raters = [desk.member(project, f"rater{index}") for index in range(2)]
    live = socket(raters[0])

    def rank():
        for rater in raters:
            while lease := lease_next(project=project, rater=rater):
                ranking_submit(rater=rater, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))

    async def watch():
        await live.connect()
        await ask(live)
        await sync_to_async(rank)()
        told = []
        while not told or told[-1]["progress"]["done"] < 6:
            told.append(await live.receive_json_from(timeout=5))
        await live.disconnect()
        return told

    assert len(asyncio.run(watch())) <= 4
