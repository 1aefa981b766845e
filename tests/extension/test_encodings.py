"""A database of another encoding than UTF8 is refused by one clear sentence."""

from __future__ import annotations

import uuid

import psycopg
import pytest

from harness import Server


@pytest.mark.parametrize("encoding", ["EUC_JP", "LATIN1", "SQL_ASCII", "WIN1252"])
def test_another_encoding_is_refused_with_a_way_out(server: Server, encoding: str) -> None:
    name, other = f"encoded_{uuid.uuid4().hex[:8]}", f"utf8_{uuid.uuid4().hex[:8]}"
    with server.connect() as db:
        db.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        try:
            with server.connect(name, client_encoding="utf8") as there:
                with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
                    there.execute("CREATE EXTENSION autoembed CASCADE")
                assert there.execute("SELECT count(*) FROM pg_extension WHERE extname = 'vector'").fetchone() == (0,)
            diagnostic = caught.value.diag
            assert (
                diagnostic.message_primary == f'database "{name}" has the encoding {encoding}, and autoembed needs UTF8'
            )
            statement = (diagnostic.message_hint or "").partition(": ")[2]
            db.execute(statement.replace("app", other).encode())
            with server.connect(other) as here:
                here.execute("CREATE EXTENSION autoembed CASCADE")
        finally:
            for made in (name, other):
                db.execute(f"DROP DATABASE IF EXISTS {made} WITH (FORCE)")
