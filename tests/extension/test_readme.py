"""README and docs: their SQL runs as written, and what they name is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import PASSWORD, Connection, Server, is_settled, put_file, run_server
from lanes import running_lanes
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
README = "README.md"
REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
DOCUMENTS = [README, "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
PAGES = [README, *(document for document in DOCUMENTS if document.startswith("docs/"))]


def sql_blocks(page: str) -> list[tuple[str, str]]:
    """Each ```sql block of a page, and the ```text block right after it: what psql prints."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```sql\n(.*?)^```\n(?:```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)


# Pages that go on with the table that this page attaches first.
ATTACHED = "docs/tables.md"
GO_ON = ["docs/search.md", "docs/models.md", "docs/troubleshooting.md"]
# Pages that need the database of pg_cron.
WITH_CRON = [README, "docs/install.md", "docs/security.md"]


@pytest.fixture(scope="module")
def reader() -> Iterator[Server]:
    """The container of somebody who follows the documents: pg_cron and a lane run in its first database."""
    with ExitStack() as stack:
        yield run_server(stack)


@contextmanager
def prepared(reader: Server, page: str) -> Iterator[tuple[str, Connection, FakeApi]]:
    """The database in which a page runs, with a lane, and the fake API in OpenAI's place."""
    with ExitStack() as stack:
        name = "postgres"
        if page not in WITH_CRON:
            name = re.sub(r"\W", "_", Path(page).stem)
            stack.enter_context(reader.database(name))
        db = stack.enter_context(reader.connect(name))
        if page not in WITH_CRON:
            db.execute("CREATE EXTENSION autoembed CASCADE")
            stack.enter_context(running_lanes(db, lambda: stack.enter_context(reader.connect(name))))
        api = reader.fake_api(name)
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
        if page in GO_ON:
            db.execute(sql_blocks(ATTACHED)[0][0])
            wait_until(lambda: is_settled(db))
        yield name, db, api


def psql(server: Server, dbname: str, sql: str, folder: Path) -> str:
    """The output of psql for the statements, each in a transaction of its own; fails where one of them does."""
    script = folder / "page.sql"
    script.write_text(sql, encoding="utf-8")
    put_file(server.container, script, "/tmp")
    command = ["psql", "--username=postgres", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file=/tmp/page.sql"]
    exit_code, (printed, errors) = server.container.get_wrapped_container().exec_run([*command, dbname], demux=True)
    assert exit_code == 0, f"{sql}\n{(errors or b'').decode()}"
    return (printed or b"").decode()


def run_page(reader: Server, page: str, dbname: str, db: Connection, folder: Path) -> None:
    """Runs the blocks of a page as written, and compares what psql prints with what the page shows."""
    for sql, expected in sql_blocks(page):
        printed = psql(reader, dbname, sql, folder)
        if expected:
            assert printed == expected
        wait_until(lambda: is_settled(db))


@pytest.mark.parametrize("page", [page for page in PAGES if sql_blocks(page) and page != "docs/models.md"])
def test_the_sql_of_a_page_runs_as_written(reader: Server, page: str, tmp_path: Path) -> None:
    with prepared(reader, page) as (dbname, db, _):
        run_page(reader, page, dbname, db, tmp_path)


def test_the_sql_of_the_page_on_models_embeds_the_table_again(reader: Server, tmp_path: Path) -> None:
    page = "docs/models.md"
    with prepared(reader, page) as (dbname, db, openai):
        run_page(reader, page, dbname, db, tmp_path)

        rows = db.execute(
            "SELECT concat_ws(E'\\n\\n', d.title, d.content) AS text, e.embedding::vector::real[] AS v"
            " FROM documents AS d LEFT JOIN documents_embeddings AS e USING (id)"
        )
        vectors = {row.text: row.v for row in rows}
        assert len(vectors) == 3
        for text, vector in vectors.items():
            assert np.allclose(vector, embedding_of(text), atol=1e-3)
        assert set(openai.texts()) == set(vectors)
        assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


@pytest.fixture
def app(db: Connection, connect: Callable[..., Connection]) -> Iterator[Connection]:
    """A session of the role of docs/security.md, with the rights that it gives."""
    [grants] = [sql for sql, _ in sql_blocks("docs/security.md") if "CREATE ROLE app" in sql]
    db.execute(grants)
    db.execute(f"ALTER ROLE app PASSWORD '{PASSWORD}'")
    yield connect(user="app")
    db.execute("DROP OWNED BY app, reader CASCADE; DROP ROLE app, reader")


def test_the_rights_of_the_documents_can_be_taken_back_and_tables_stay_attached(
    db: Connection, api: FakeApi, app: Connection
) -> None:
    app.execute("CREATE TABLE notes (id integer PRIMARY KEY, body text)")
    app.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
    [revokes] = [sql for sql, _ in sql_blocks("docs/security.md") if "REVOKE USAGE" in sql]

    db.execute(revokes)

    left = "SELECT FROM pg_catalog.{0}, aclexplode({1}) AS a WHERE a.grantee = 'app'::regrole {2}"
    for catalog, rights, which in (
        ("pg_namespace", "nspacl", "AND nspname = 'autoembed'"),
        ("pg_class", "relacl", "AND relnamespace = 'autoembed'::regnamespace"),
        ("pg_attribute", "attacl", ""),
        ("pg_proc", "proacl", "AND pronamespace = 'autoembed'::regnamespace"),
    ):
        assert db.execute(left.format(catalog, rights, which)).rowcount == 0, catalog
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute("SELECT * FROM autoembed.search('notes', 'a note')")
    app.execute("INSERT INTO notes VALUES (1, 'a note')")
    db.execute("SELECT autoembed.process()")
    assert app.execute("SELECT id FROM notes_embeddings").fetchall() == [(1,)]


def test_the_role_of_the_documents_may_search_and_attach_its_own_table(db: Connection, app: Connection) -> None:
    app.execute("CREATE TABLE notes (id integer PRIMARY KEY, body text, embedding vector(384))")
    app.execute("CREATE FUNCTION note_text(note notes) RETURNS text LANGUAGE sql RETURN note.body")
    app.execute(
        "CREATE TRIGGER embed AFTER INSERT ON notes FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding')"
    )
    app.execute("INSERT INTO notes VALUES (1, 'a note')")
    db.execute("SELECT autoembed.process()")

    row = app.execute("SELECT embedding <=> autoembed.embed('a note') AS distance FROM notes").fetchone()

    assert row is not None
    assert row.distance == pytest.approx(0, abs=1e-5)
    [found] = app.execute("SELECT body FROM autoembed.search_rows(NULL::notes, 'a note')")
    assert found.body == "a note"


def test_the_reference_is_what_the_comments_of_the_extension_say(server: Server, dbname: str, tmp_path: Path) -> None:
    script = (ROOT / "docs/reference.sql").read_text(encoding="utf-8")

    assert psql(server, dbname, script, tmp_path) == REFERENCE, "run `make reference`"


def test_every_function_has_its_section_in_the_reference() -> None:
    assert "\n## Others\n" not in REFERENCE


def test_every_function_that_a_page_calls_exists(db: Connection) -> None:
    functions = db.execute("SELECT proname FROM pg_proc WHERE pronamespace = 'autoembed'::regnamespace")
    existing = {row.proname for row in functions}

    named = {
        name
        for page in PAGES
        for name in re.findall(r"autoembed\.(\w+)\(", (ROOT / page).read_text(encoding="utf-8"))
        if not re.fullmatch(r"_\w+_N", name)
    }
    assert named - existing == set()


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    text = (ROOT / document).read_text(encoding="utf-8")

    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = target.partition("#")
        if path.startswith("http"):
            continue
        file = folder / path if path else ROOT / document
        if not file.exists():
            broken.append(target)
        elif fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            broken += [target] if fragment not in map(anchor, headings) else []
    assert broken == []


def files_named_in(text: str) -> set[str]:
    """The words in backticks or commands that look like a file or folder of the project."""
    words = {
        word.rstrip(".,;:")
        for code in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
        for word in " ".join(code).split()
    }
    pattern = re.compile(
        r"(?!/)[\w.-]*(?:/[\w.-]*)*(?:/|\.(?:py|sql|sh|md|yaml|txt|toml|control|postgres))|\.ci/run|"
        r"Makefile|docker/\w+|tests/[\w/]+"
    )
    return {word for word in words if pattern.fullmatch(word)}


def test_a_missing_file_would_be_noticed() -> None:
    named = files_named_in(
        "`sql/nowhere.sql` in `no/such/` and\n```sh\npytest tests/gone.py -k x\n```\nnot `/abs/x.py`"
    )

    assert named == {"sql/nowhere.sql", "no/such/", "tests/gone.py"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    named = files_named_in((ROOT / document).read_text(encoding="utf-8"))
    # Paths that only a server or somebody else's repository has.
    elsewhere = {"postgresql.conf", "build/packages/", "model.onnx", "tokenizer.json", "postgresql/17/"}

    assert {name for name in named - elsewhere if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("document", [README, "CONTRIBUTING.md", "docs/install.md"])
def test_every_make_target_that_is_named_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE))

    assert named
    assert named <= targets
