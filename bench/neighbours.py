"""Two tenants of one database: an honest one, whose table is `documents`, and a hostile one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from bench.server import hung_api
from extension.hostile.attacks import ATTACKS
from extension.hostile.tenants import Tenant
from harness import Connection, Server


@contextmanager
def honest_tenant(server: Server, db: Connection) -> Iterator[Connection]:
    """A session of the role that owns the table `documents`, and nothing else."""
    _create(db, "honest")
    db.execute("ALTER TABLE documents OWNER TO honest")
    with closing(server.connect(user="honest")) as session:
        yield session


@contextmanager
def attacking(server: Server, db: Connection, attack: str) -> Iterator[None]:
    _create(db, "hostile")
    hung_api(server).behave(hold=True)
    with closing(server.connect(user="hostile")) as session:
        tenant = Tenant("hostile", session, lambda: server.connect(user="hostile"))
        with ATTACKS[attack].going_on(db, tenant, hung_api(server).base_url):
            yield


def _create(db: Connection, role: str) -> None:
    db.execute(f"CREATE ROLE {role} LOGIN; CREATE SCHEMA {role} AUTHORIZATION {role}")
    db.execute("SELECT autoembed.grant_usage(%s)", [role])
