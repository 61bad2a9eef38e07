"""Eight processes race for the same prompts on PostgreSQL: nothing is handed out too often, and nothing is lost.

The raters are separate operating-system processes with their own connections, because that is where locking fails: threads of one
process, or one connection, would take turns anyway. Each sends every ranking twice, skips now and then, and lets leases run out.
"""

import getpass
import json
import os
import subprocess
import sys
import uuid
from collections import Counter

import psycopg
import pytest
from django.conf import settings

URL = os.environ.get("DATABASE_URL", "")
SERVER = (
    URL.rsplit("/", 1)[0]
    if URL.startswith("postgres")
    else os.environ.get("RANKLOOP_TEST_POSTGRES", f"postgres://{getpass.getuser()}@127.0.0.1:5432")
)
PROCESSES, PROMPTS, OVERLAP = 8, 40, 3


def answers() -> bool:
    try:
        psycopg.connect(f"{SERVER}/postgres", connect_timeout=2).close()
    except psycopg.Error:
        return False
    return True


pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(not answers(), reason=f"no PostgreSQL answers at {SERVER}: set RANKLOOP_TEST_POSTGRES or DATABASE_URL"),
]

TOGETHER = """
import json, os, random, sys, time, uuid
from pathlib import Path
import django; django.setup()

def together(stage):
    # Every process says that it is ready, and goes on once all are: none has a head start, however slowly Python starts.
    Path(sys.argv[2], f"{stage}-{os.getpid()}").touch()
    while len(list(Path(sys.argv[2]).glob(f"{stage}-*"))) < int(sys.argv[3]):
        time.sleep(0.002)
"""

RACER = """
from django.db import connection
from annotation.errors import Refused
from annotation.models import Lease, Project, User
from annotation.services.leases import lease_next, lease_skip
from annotation.services.rankings import ranking_submit
name = sys.argv[1]
rater, project, chance = User.objects.get(username=name), Project.objects.get(slug="race"), random.Random(name)
sent, skipped, late, idle = [], 0, 0, 0
together("start")
while idle < 8:
    lease = lease_next(project=project, rater=rater)
    if lease is None:
        idle += 1
        time.sleep(0.1)
        continue
    idle = 0
    bands, client_id = [[uid] for uid in lease.displayed], uuid.uuid4()
    dice = chance.random()
    if dice < 0.05:
        lease_skip(rater=rater, token=lease.token, reason="other")
        skipped += 1
    elif dice < 0.15:
        # The rater leaves for longer than his lease: somebody else may take the slot under his hands.
        Lease.objects.filter(pk=lease.pk, token=lease.token).update(expires_at="2020-01-01T00:00Z")
        time.sleep(0.02)
        try:
            ranking_submit(rater=rater, token=lease.token, client_id=client_id, bands=bands)
            sys.exit("an expired lease was accepted")
        except Refused as refused:
            assert refused.code in {"lease_expired", "lease_lost"}, refused.code
            late += 1
    else:
        first, created = ranking_submit(rater=rater, token=lease.token, client_id=client_id, bands=bands)
        second, again = ranking_submit(rater=rater, token=lease.token, client_id=client_id, bands=bands)
        assert created and not again and first.pk == second.pk
        sent.append([str(client_id), bands])
print(json.dumps({"sent": sent, "skipped": skipped, "late": late}))
"""

TWINS = """
from annotation.models import Project, User
from annotation.services.leases import lease_next
from annotation.services.rankings import ranking_submit
name = sys.argv[1]
rater, project = User.objects.get(username=name), Project.objects.get(slug="twins")
together("start")
lease = lease_next(project=project, rater=rater)
together("submit")
ranking, created = ranking_submit(rater=rater, token=lease.token, client_id=uuid.UUID(int=5), bands=[[uid] for uid in lease.displayed])
print(json.dumps({"token": str(lease.token), "created": created}))
"""

SEED = f"""
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from tests.annotation import desk
project = desk.project("race", overlap={OVERLAP}, lease_seconds=600)
desk.prompts(project, number={PROMPTS})
for index in range({PROCESSES}):
    desk.member(project, f"rater{{index}}")
twins = desk.project("twins")
desk.prompts(twins)
desk.member(twins, "rater0")
"""


@pytest.fixture(scope="module")
def database():
    """A database of its own with two projects, as a URL; dropped afterwards."""
    name = f"rankloop_race_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    run(f"{SERVER}/{name}", SEED)
    yield f"{SERVER}/{name}"
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def environment(database):
    return {**os.environ, "DATABASE_URL": database, "REDIS_URL": "", "PYTHONPATH": str(settings.BASE_DIR), "RANKLOOP_LOG_LEVEL": "ERROR"}


def run(database, code):
    subprocess.run([sys.executable, "-c", code], env=environment(database), cwd=settings.BASE_DIR, check=True, timeout=120)


def rows(database, query, slug):
    with psycopg.connect(database) as connection:
        return connection.execute(f"{query} x JOIN annotation_project p ON p.id = x.project_id WHERE p.slug = %s", [slug]).fetchall()


def race(database, folder, code, names):
    options = {"env": environment(database), "cwd": settings.BASE_DIR, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen([sys.executable, "-c", TOGETHER + code, name, str(folder), str(len(names))], **options) for name in names]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(output) for output in outputs]


def test_eight_processes_never_rank_a_prompt_too_often_and_lose_nothing(database, tmp_path):
    results = race(database, tmp_path, RACER, [f"rater{index}" for index in range(PROCESSES)])
    sent = {client_id: bands for result in results for client_id, bands in result["sent"]}
    stored = rows(database, "SELECT client_id::text, bands, prompt_id, rater_id FROM annotation_ranking", "race")
    states = rows(database, "SELECT state FROM annotation_lease", "race")
    assert {row[0]: row[1] for row in stored} == sent, "a ranking was lost or altered"
    assert len(stored) == len(sent) == len({row[2:] for row in stored}) == PROMPTS * OVERLAP
    assert set(Counter(row[2] for row in stored).values()) == {OVERLAP}
    assert Counter(row[0] for row in states) == {"done": PROMPTS * OVERLAP}
    assert sum(result["skipped"] for result in results) and sum(result["late"] for result in results)


def test_one_rater_in_eight_processes_gets_one_prompt_and_stores_one_ranking(database, tmp_path):
    results = race(database, tmp_path, TWINS, ["rater0"] * PROCESSES)
    assert len({result["token"] for result in results}) == 1
    assert sorted(result["created"] for result in results) == [False] * (PROCESSES - 1) + [True]
    assert len(rows(database, "SELECT uid FROM annotation_ranking", "twins")) == 1
