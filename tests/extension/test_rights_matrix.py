"""Who may do what, written out, and who sees what; where keys never are; the SQL of docs/security.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi
from harness import PASSWORD, Connection, Server, put_file, run_server, warnings_of
from waiting import wait_until

Connect = Callable[..., Connection]
Role = Callable[[str], str]

SECURITY = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text(encoding="utf-8")
SQL_BLOCKS = re.findall(r"^```sql\n(.*?)^```$", SECURITY, re.MULTILINE | re.DOTALL)
MODEL = "text-embedding-3-small"

# Who may execute it: a role without grants, an owner of a table with grant_usage, one with grant_monitor, a superuser.
FUNCTIONS = """
_add_model - - - x
_admit_readers - - - x
_adopt - - - x
_adopt_rows - - - x
_adopt_vectors - - - x
_advisory_locks - x - x
_after_drop - - - x
_after_renames - - - x
_alter_as_owner - x - x
_arguments - x - x
_as_owner - x - x
_backfill - - - x
_backfill_lane_is_scheduled - - - x
_before_drop - - - x
_beginning - x - x
_bits - x - x
_bits_indexed - - - x
_broken_jobs - - - x
_build_embedders - - - x
_build_index - - - x
_build_partition_triggers - - - x
_build_pipeline - - - x
_build_triggers - - - x
_build_without_workers - - - x
_bytes_per_message - - - x
_call_embedder - - - x
_changed_expression - - - x
_check_api_key - - - x
_check_attachable - x - x
_check_beside - x - x
_check_budget - - - x
_check_chunk_function - - - x
_check_chunking - x - x
_check_chunks_view - x - x
_check_content - x - x
_check_content_function - - - x
_check_embedding_column - - - x
_check_embeddings_table - - - x
_check_everything - - - x
_check_function_owner - - - x
_check_index - x - x
_check_model - - - x
_check_model_options - - - x
_check_numbers - - - x
_check_on_change - x - x
_check_options - - - x
_check_own - x - x
_check_owner - x - x
_check_pipeline - x x x
_check_policy - - - x
_check_restored - - - x
_check_role - - - x
_check_table - - - x
_check_template - x - x
_check_trigger - - - x
_check_vector_rights - - - x
_chunk_call - x - x
_chunk_function_of - x - x
_chunk_size - - - x
_chunk_text - x - x
_chunking - x - x
_chunks - - - x
_chunks_view - - - x
_claim - - - x
_clean_up - - - x
_clears - x - x
_close_function - - - x
_columns_of - x - x
_compute_virtual - - - x
_condition_guard - - - x
_condition_objects - - - x
_condition_problem - - - x
_content_bytes_expression - - - x
_content_expression - x - x
_content_function - x - x
_content_function_of - x - x
_content_guard - - - x
_continue_advice - - - x
_copy_embeddings - - - x
_create_function - - - x
_create_functions - - - x
_cron_is_here - x - x
_cron_places - - - x
_default_model - x x x
_define - - - x
_defined - - - x
_deny_readers - - - x
_dependents - - - x
_digests - - - x
_dimensions - x - x
_distances - x - x
_drop_functions - - - x
_drop_orphaned_pipelines - x - x
_drop_part - - - x
_drop_readers - - - x
_drop_stray_triggers - x - x
_drop_texts - - - x
_embed - - - x
_embedder - - - x
_embedder_version - - - x
_end - - - x
_ended - - - x
_enter_lane - - - x
_erasures - - - x
_estimate_texts - x - x
_estimated_matches - x - x
_estimated_rows - x x x
_exact_answers - x - x
_execute - x - x
_extend - - - x
_fail - - - x
_fail_backfill - - - x
_fail_message - - - x
_filled - - - x
_find_functions - - - x
_finish_backfills - - - x
_fit_embeddings_table - - - x
_fold_usage - - - x
_follow - - - x
_follow_drops - - - x
_follow_embeddings_table - - - x
_follow_functions - - - x
_follow_grants - - - x
_follow_one - - - x
_follow_others - - - x
_follow_partitions - - - x
_follow_restore - - - x
_follow_rewrite - - - x
_follow_schemas - - - x
_follow_tables - - - x
_follow_truncate - - - x
_follow_unseen - - - x
_forget - - - x
_forget_all - - - x
_forget_ended - - - x
_forget_old_keys - - - x
_forget_part - - - x
_forget_permits - - - x
_forget_postings - - - x
_forget_restored - - - x
_forget_runs - - - x
_forget_texts - - - x
_free_slots - - - x
_full_limit - - - x
_full_text_config - x - x
_function_guard - - - x
_function_named - - - x
_function_template - - - x
_gate - - - x
_grant - - - x
_guide_triggers - x - x
_has_foreign_types - - - x
_has_key_expression - - - x
_has_plain_text - - - x
_hold_index_job - - - x
_http_hosts - - - x
_index_job - - - x
_index_key - x - x
_index_may_be_built - - - x
_index_texts - - - x
_indexes_on_vectors - x - x
_inherits - - - x
_is_binary - x - x
_is_chosen - - - x
_is_empty - x - x
_is_key - - - x
_is_open - - - x
_is_pipeline_of - x x x
_is_plain - x - x
_is_renamed - - - x
_is_retired - - - x
_is_spelled_one_way - - - x
_is_subscribed - x - x
_is_superusers - - - x
_is_uncommitted - - - x
_job_of_lane - - - x
_job_runs - - - x
_judged_keys - x - x
_judgments - x - x
_keep_name - - - x
_keep_restored_model - - - x
_keep_restored_queue - - - x
_key_columns - x - x
_key_expression - x - x
_key_operator - x - x
_key_slots - - - x
_key_text - x - x
_keys_of_rows - - - x
_keys_per_message - - - x
_labels - - - x
_lane_checks - - - x
_lane_is_wanted - - - x
_lane_jobs - - - x
_lane_lives - x x x
_lane_roles - - - x
_lanes_are_starting - x - x
_lasting_target - x - x
_learn - - - x
_learnt - - - x
_leave_lane - - - x
_list_queue - - - x
_load_python - x x x
_lock_holder - x - x
_lock_table - x - x
_look_through - x - x
_make_embeddings_table - x - x
_make_slots - - - x
_match_function - x - x
_may_see - x x x
_may_take_key - - - x
_may_write_vectors - - - x
_measured_recall - x - x
_mend_restored - - - x
_missing_guide_triggers - x - x
_model - - - x
_model_changed - - - x
_model_facts - - - x
_model_fault - - - x
_model_identity - - - x
_move_embeddings - - - x
_nearest - x - x
_nearest_rows_slots - - - x
_needed_columns - x - x
_never - - - x
_new_place - x - x
_next_backfill - - - x
_note_plan - - - x
_note_replaced - - - x
_note_search - x - x
_note_usage - - - x
_objects_named - - - x
_open_functions - - - x
_open_tables - - - x
_open_to - - - x
_operator - x - x
_output_settings - - - x
_owned_pipeline - x - x
_owned_pipelines - x - x
_owns - x x x
_paid_chunks - - - x
_paid_vectors - - - x
_part_of_long_text x x x x
_partition_tree - x x x
_partition_triggers - x - x
_passage_expression - - - x
_passage_of_hit - - - x
_pay_chunks - - - x
_pipeline_checks - x - x
_pipeline_of_policy - - - x
_pipelines - - - x
_plan - - - x
_plan_again - - - x
_plan_stopped - - - x
_prefix_expression - x - x
_prefix_of - x - x
_present_text - x - x
_preview - x - x
_price_and_rate - - - x
_probe - - - x
_process - - - x
_protect_functions - - - x
_purposes - - - x
_python_sources - x x x
_queue_backfill - - - x
_queue_recorded - - - x
_read_condition - x - x
_readable_text - - - x
_readers_functions - - - x
_recall - x - x
_record_embedded - - - x
_refuse - x - x
_refuse_without_vectors - x - x
_release - - - x
_remove_retired_job - - - x
_renamed - - - x
_renamed_template - - - x
_replace_index - x - x
_replace_segments - - - x
_requeue - - - x
_rerank - x - x
_rerank_candidates - x - x
_reranked - x - x
_reset_search_stats - x - x
_resolve - - - x
_rest_model - - - x
_rest_pipelines - - - x
_restore_advisory_locks - x - x
_retry_failure - - - x
_rights_problems - x - x
_rows_of - - - x
_rows_to_try - - - x
_run_as_owner - x - x
_run_statement_as_owner - x - x
_running_lanes - x - x
_runs_owners_code - - - x
_sample_query - x - x
_schedule_index - - - x
_schedule_statement - - - x
_scores - - - x
_search_page - x - x
_search_quality - x - x
_search_stats - x x x
_search_target - x - x
_searched - x - x
_segments_to_merge - - - x
_sent_keys - - - x
_serves_searches - x - x
_set_paused - x - x
_settle - - - x
_share_embeddings - - - x
_short_key - x x x
_short_keys - - - x
_slots - - - x
_spent_budget - - - x
_stage - - - x
_start_advice - - - x
_stray_triggers - x - x
_table_guard - - - x
_table_shape - - - x
_take_key - - - x
_take_key_beside - - - x
_take_permit - - - x
_take_restored - - - x
_take_slot - - - x
_template - x - x
_text_config - - - x
_text_facts - - - x
_trigger_name - x - x
_trigger_problems - x - x
_unindexed - - - x
_unschedule - - - x
_unshared - - - x
_updated - - - x
_used_types - - - x
_vault_key - - - x
_vector_access - - - x
_vector_digest_expression - x - x
_vector_faults - - - x
_vector_index - x - x
_vector_indexes - x - x
_vector_types - - - x
_vector_version - - - x
_waits_for_commit - x - x
_warn_of_blocked_pipelines - - - x
_warn_once - - - x
_with_chunk_function - - - x
_with_content_function - - - x
_without_replica_identity - - - x
_work - - - x
allow_http_host - - - x
alter_model - - - x
alter_pipeline - x - x
chunk_text - x - x
clear_column - x - x
create_match_function - x - x
create_model - - - x
create_rerank_model - - - x
disable - x - x
doctor - x - x
drop_model - - - x
embed - x - x
embed_query - x - x
enable - x - x
estimate - x - x
evaluate_search - x - x
grant_lane - - - x
grant_monitor - - - x
grant_usage - - - x
measure_recall - x - x
pause - x - x
preview - x - x
process - - - x
queue_embeddings - x - x
reembed - x - x
reset_search_stats - x - x
resume - x - x
resume_model - - - x
resync - x - x
retry_failed - x - x
schedule - - - x
search - x - x
search - x - x
search - x - x
search_rows - x - x
set_default_model - - - x
tune - x - x
unschedule - - - x
wait_until_fresh - x - x
work - - - x
"""

# r: select, a: insert, w: update, d: delete. Below a relation the columns of which somebody may do more than of all.
RELATIONS = """
_job - - - rawd
_own_failure - r - rawd
_own_failure.retried - rw - raw
_own_pipeline_state - r - rawd
_pipeline_state - - - rawd
_row_state - r - rawd
_this_lane - - - rawd
backfill - r - rawd
backfill.condition - raw - raw
backfill.condition_objects - raw - raw
backfill.create_index - raw - raw
backfill.force - raw - raw
backfill.index_problem - rw - raw
backfill.pipeline_id - ra - raw
backfill.position - rw - raw
backfill.rows_queued - rw - raw
backfill.scanned_at - rw - raw
backfill.started_at - rw - raw
embedded - - - rawd
failed - r r rawd
failure - - - rawd
lane - - - rawd
model - - - rawd
model_limit - - - rawd
model_rest - - r rawd
paid_chunk - - - rawd
permit - - - rawd
pipeline - r - rawd
pipeline.adopts - ra - raw
pipeline.binary_index - raw - raw
pipeline.chunk_function - raw - raw
pipeline.chunk_overlap - raw - raw
pipeline.chunk_prefix - raw - raw
pipeline.chunk_size - raw - raw
pipeline.chunking - raw - raw
pipeline.condition - raw - raw
pipeline.condition_columns - raw - raw
pipeline.condition_objects - raw - raw
pipeline.content_columns - raw - raw
pipeline.content_function - raw - raw
pipeline.content_template - raw - raw
pipeline.ef_search - rw - raw
pipeline.embedding_column - raw - raw
pipeline.embeddings_table - raw - raw
pipeline.ended - rw - raw
pipeline.former_chunking - rw - raw
pipeline.model - raw - raw
pipeline.on_change - raw - raw
pipeline.paused - rw - raw
pipeline.recall - rw - raw
pipeline.recall_measured_at - rw - raw
pipeline.recall_target - rw - raw
pipeline.replicated - ra - raw
pipeline.table_id - ra - raw
pipeline.text_config - raw - raw
pipeline.truncate - raw - raw
pipeline_rest - - - rawd
progress - r r rawd
restored - - - rawd
search_stats - r r rawd
setting - - - rawd
slot - - - rawd
status - r r rawd
text_document - - - rawd
text_posting - - - rawd
text_segment - - - rawd
turn - - - rawd
usage - r r rawd
usage_day - - - rawd
usage_entry - - - rawd
"""

# Those made for a pipeline aside.
ROUTINES = r"""
    SELECT p.proname AS name,
           ARRAY(SELECT CASE WHEN has_function_privilege(r.name, p.oid, 'EXECUTE') THEN 'x' ELSE '-' END
                 FROM unnest(%s::text[]) WITH ORDINALITY AS r(name, position) ORDER BY r.position) AS rights
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace
      AND p.proname !~ '^_(content|write|scan|nearest_rows|text|capture|clear)_[0-9]+$'
"""
COLUMN_LETTERS = "(VALUES ('r', 'SELECT', 1), ('a', 'INSERT', 2), ('w', 'UPDATE', 3)) AS k(letter, name, n)"
LETTERS = COLUMN_LETTERS.replace(")) AS", "), ('d', 'DELETE', 4)) AS")
TABLES = f"""
    SELECT c.relname AS name,
           ARRAY(SELECT coalesce(string_agg(k.letter, '' ORDER BY k.n), '-')
                 FROM unnest(%(roles)s::text[]) WITH ORDINALITY AS r(name, position)
                 LEFT JOIN {LETTERS} ON has_table_privilege(r.name, c.oid, k.name)
                 GROUP BY r.position ORDER BY r.position) AS rights
    FROM pg_class AS c
    WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p', 'f')
    UNION ALL
    SELECT c.relname || '.' || a.attname,
           ARRAY(SELECT coalesce(string_agg(k.letter, '' ORDER BY k.n), '-')
                 FROM unnest(%(roles)s::text[]) WITH ORDINALITY AS r(name, position)
                 LEFT JOIN {COLUMN_LETTERS} ON has_column_privilege(r.name, c.oid, a.attnum, k.name)
                 GROUP BY r.position ORDER BY r.position)
    FROM pg_class AS c
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p', 'f')
      AND EXISTS (
          SELECT FROM unnest(%(roles)s::text[]) AS r(name)
          JOIN {COLUMN_LETTERS} ON has_column_privilege(r.name, c.oid, a.attnum, k.name)
          WHERE NOT has_table_privilege(r.name, c.oid, k.name)
      )
"""


@pytest.fixture
def people(db: Connection, api: FakeApi, role: Role) -> dict[str, str]:
    """Somebody without grants, two owners of tables, and a monitor."""
    names = {name: role(name) for name in ("nobody", "alice", "bob", "watcher")}
    for owner in ("alice", "bob"):
        db.execute("SELECT autoembed.grant_usage(%s)", [names[owner]])
        db.execute(f"CREATE SCHEMA {names[owner]} AUTHORIZATION {names[owner]}")
    db.execute("SELECT autoembed.grant_monitor(%s)", [names["watcher"]])
    return names


@pytest.fixture
def tables(db: Connection, people: dict[str, str], connect: Connect, api: FakeApi) -> dict[str, str]:
    """A table of alice's and one of bob's, each with a row that is embedded, one that failed, and a backfill."""
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    for owner in ("alice", "bob"):
        with connect(user=people[owner]) as session:
            session.execute(f"CREATE TABLE {owner}_notes (id int PRIMARY KEY, content text)")
            session.execute(f"SELECT autoembed.enable('{owner}_notes', 'embedding', content_columns => '{{content}}')")
            session.execute(f"INSERT INTO {owner}_notes VALUES (1, '{owner}''s secret'), (2, 'poison')")
    while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass
    for owner in ("alice", "bob"):
        db.execute(f"SELECT autoembed.resync('{people[owner]}.{owner}_notes')")
    return {owner: f"{people[owner]}.{owner}_notes" for owner in ("alice", "bob")}


def test_an_owner_has_doctor_usage_and_retry_failed_of_the_own_tables(
    db: Connection, people: dict[str, str], tables: dict[str, str], connect: Connect, api: FakeApi
) -> None:
    # doctor() leaves pg_cron some time to start the lanes.
    is_starting = "SELECT autoembed._lanes_are_starting()"
    wait_until(lambda: db.execute(is_starting).fetchone() == (False,), seconds=60)
    with connect(user=people["alice"]) as alice:
        checks = alice.execute("SELECT * FROM autoembed.doctor()").fetchall()
        assert {row.subject.rpartition(" ")[2] for row in checks} == {"lanes", f"{tables['alice']}.embedding"}
        assert {row.subject.partition(" ")[0]: row.ok for row in checks} == {
            "lanes": False, "table": True, "triggers": True, "rights": True, "index": True, "failed": False,
        }  # fmt: skip
        assert "a superuser" in checks[0].advice
        [failed] = [row for row in checks if row.subject.startswith("failed")]
        assert failed.finding.startswith("1, the last: ")

        used = alice.execute("SELECT DISTINCT table_name FROM autoembed.usage").fetchall()
        assert used == [("alice_notes",)]

        api.behave()
        [bobs] = db.execute("SELECT %s::regclass::oid::int AS id", [tables["bob"]]).fetchall()
        assert alice.execute("SELECT autoembed.retry_failed(%s::oid::regclass)", [bobs.id]).fetchone() == (0,)
        assert alice.execute("SELECT autoembed.retry_failed()").fetchone() == (1,)
        assert alice.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
    assert [row.table_name for row in db.execute("SELECT table_name FROM autoembed.failed")] == [tables["bob"]]
    while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass
    missing = f"SELECT count(*) FROM {tables['alice']} WHERE embedding IS NULL"
    assert db.execute(missing.encode()).fetchone() == (0,)


def test_an_owner_has_doctor_of_a_table_with_triggers_by_hand(
    db: Connection, people: dict[str, str], connect: Connect
) -> None:
    with connect(user=people["alice"]) as alice:
        alice.execute("CREATE TABLE by_hand (id int PRIMARY KEY, content text, embedding halfvec(8))")
        alice.execute("CREATE FUNCTION hand_text(b by_hand) RETURNS text LANGUAGE sql IMMUTABLE RETURN b.content")
        alice.execute(
            "CREATE TRIGGER embed AFTER INSERT OR UPDATE ON by_hand FOR EACH ROW"
            " EXECUTE FUNCTION autoembed.queue_embeddings('hand_text', 'embedding')"
        )
        found = alice.execute(
            "SELECT subject, ok FROM autoembed.doctor() WHERE subject LIKE 'triggers of %'"
        ).fetchall()
    assert [(row.subject.partition(".")[2], row.ok) for row in found] == [("by_hand.embedding", True)]


def matrix(db: Connection, sql: str, people: dict[str, str]) -> list[str]:
    roles = [people["nobody"], people["alice"], people["watcher"], "postgres"]
    arguments: Any = {"roles": roles} if "%(roles)s" in sql else [roles]
    return sorted(f"{row.name} {' '.join(row.rights)}" for row in db.execute(sql.encode(), arguments))


def test_who_may_execute_what(db: Connection, people: dict[str, str], tables: dict[str, str]) -> None:
    assert matrix(db, ROUTINES, people) == FUNCTIONS.strip().splitlines()


def test_who_may_read_and_write_what(db: Connection, people: dict[str, str], tables: dict[str, str]) -> None:
    assert matrix(db, TABLES, people) == RELATIONS.strip().splitlines()


def test_a_role_reaches_no_schema_but_that_which_it_was_granted(db: Connection, people: dict[str, str]) -> None:
    # pgmq itself lets members of pg_monitor read its queues, which hold keys of rows and no texts.
    for who, reached in (("nobody", []), ("alice", ["autoembed"]), ("watcher", ["autoembed", "pgmq"])):
        rows = db.execute(
            "SELECT n.nspname::text AS name FROM pg_namespace AS n"
            " WHERE n.nspname IN ('autoembed', 'pgmq', 'cron') AND has_schema_privilege(%s, n.oid, 'USAGE')"
            " ORDER BY 1",
            [people[who]],
        )
        assert [row.name for row in rows] == reached


# The functions made for a pipeline: for lanes, and for their owner, as whom they run.
def test_the_functions_of_a_table_are_its_owners_and_nobody_elses(
    db: Connection, people: dict[str, str], tables: dict[str, str]
) -> None:
    rows = db.execute(
        "SELECT p.proname::text AS name, p.proowner::regrole::text AS owner, p.prosecdef,"
        " ARRAY(SELECT r.name FROM unnest(%s::text[]) AS r(name)"
        "       WHERE has_function_privilege(r.name, p.oid, 'EXECUTE')) AS by"
        " FROM pg_proc AS p WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname ~ '_1$' ORDER BY 1",
        [[people[name] for name in ("nobody", "alice", "bob", "watcher")]],
    ).fetchall()

    alice = people["alice"]
    assert [tuple(row) for row in rows] == [
        ("_capture_1", "postgres", True, []),
        ("_clear_1", "postgres", True, []),
        ("_content_1", alice, True, [alice]),
        # search() calls it with the rights of its caller.
        ("_nearest_rows_1", "postgres", False, [people[name] for name in ("nobody", "alice", "bob", "watcher")]),
        ("_scan_1", alice, True, [alice]),
        ("_write_1", alice, True, [alice]),
    ]


# Who sees what --------------------------------------------------------------------------------------


def tables_in(session: Connection, relation: str, column: str = "table_name") -> set[str]:
    rows = session.execute(f"SELECT {column}::text AS name FROM autoembed.{relation}")
    return {row.name.split(".")[-1] for row in rows if row.name}


def test_an_owner_sees_his_own_tables_alone(tables: dict[str, str], people: dict[str, str], connect: Connect) -> None:
    for owner in ("alice", "bob"):
        session = connect(user=people[owner])
        own = {f"{owner}_notes"}
        assert tables_in(session, "pipeline", "table_id") == own
        assert tables_in(session, "status") == own
        assert tables_in(session, "failed") == own
        assert [row.excerpt for row in session.execute("TABLE autoembed.failed")] == ["poison"]
        assert (
            tables_in(session, "backfill AS b JOIN autoembed.pipeline AS p ON p.id = b.pipeline_id", "p.table_id")
            == own
        )
        assert session.execute("SELECT count(*) FROM autoembed.backfill").fetchone() == (1,)


def test_a_monitor_sees_all_tables_and_no_text(
    db: Connection, tables: dict[str, str], people: dict[str, str], connect: Connect
) -> None:
    session = connect(user=people["watcher"])

    assert tables_in(session, "status") == {"alice_notes", "bob_notes"}
    assert tables_in(session, "failed") == {"alice_notes", "bob_notes"}
    seen = ""
    for view in ("status", "progress", "failed", "usage", "model_rest"):
        seen += str(session.execute(f"TABLE autoembed.{view}").fetchall())
    assert "poison" not in seen and "secret" not in seen
    assert db.execute("SELECT count(*) FROM autoembed.failed WHERE excerpt = 'poison'").fetchone() == (2,)
    for relation in ("pipeline", "backfill", "embedded", "failure", "model", "setting", "lane", "usage_entry"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(f"TABLE autoembed.{relation}")


def test_a_monitor_reads_no_text_out_of_the_reason_of_a_failure(
    db: Connection, people: dict[str, str], connect: Connect
) -> None:
    with connect(user=people["alice"]) as alice:
        alice.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
        alice.execute(
            "CREATE FUNCTION its_text(n notes) RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN n.content::int; END'"
        )
        alice.execute("SELECT autoembed.enable('notes', 'embedding', content_function => 'its_text')")
        alice.execute("INSERT INTO notes VALUES (1, 'a secret')")
        for _ in range(5):
            db.execute("SELECT autoembed.process()")
            db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
        [own] = alice.execute("SELECT reason FROM autoembed.failed").fetchall()
    [seen] = connect(user=people["watcher"]).execute("SELECT * FROM autoembed.failed").fetchall()

    assert own.reason == 'invalid input syntax for type integer: "a secret"'
    assert "secret" not in str(seen)


# Each call on a table of somebody else's; {table} is bob's.
FOREIGN_CALLS = [
    "SELECT autoembed.enable('{table}', 'other', content_columns => '{{content}}')",
    "SELECT autoembed.enable('{table}', 'embedding', content_columns => '{{content}}', if_not_exists => true)",
    "SELECT autoembed.alter_pipeline('{table}', condition => 'true')",
    "SELECT autoembed.disable('{table}')",
    "SELECT autoembed.pause('{table}')",
    "SELECT autoembed.resume('{table}')",
    "SELECT autoembed.resync('{table}')",
    "SELECT autoembed.reembed('{table}')",
    "SELECT autoembed.preview('{table}', '1')",
    "SELECT autoembed._preview(2, 'a text', NULL, NULL, NULL, NULL, NULL)",
    "SELECT autoembed.estimate('{table}')",
    "SELECT autoembed.estimate('{table}', content_columns => '{{content}}')",
    "SELECT autoembed.wait_until_fresh('{table}')",
    "INSERT INTO autoembed.pipeline (table_id, embedding_column, content_columns)"
    " VALUES ('{table}', 'embedding', '{{content}}')",
    "INSERT INTO autoembed.backfill (pipeline_id) VALUES (2)",
    "SELECT autoembed._content_2('{{[1]}}', 0, 0)",
    "SELECT autoembed._write_2('{{[1]}}', '{{x}}', 'm', '{{NULL}}', '{{NULL}}')",
    "SELECT autoembed._scan_2(NULL, NULL, 1, 1)",
]


@pytest.mark.parametrize("who", ["alice", "nobody", "watcher"])
def test_nobody_without_the_owners_rights_does_anything_to_a_table(
    db: Connection, tables: dict[str, str], people: dict[str, str], connect: Connect, who: str
) -> None:
    # Names are no secret in PostgreSQL, so let a stranger get as far as that.
    db.execute(f"GRANT USAGE ON SCHEMA {people['bob']} TO PUBLIC")
    before = db.execute("TABLE autoembed.pipeline").fetchall()
    session = connect(user=people[who])
    allowed = []

    for call in FOREIGN_CALLS:
        try:
            session.execute(call.format(table=tables["bob"]).encode())
        except psycopg.errors.InsufficientPrivilege as error:
            assert "iterator" not in str(error)
            continue
        allowed.append(call)

    assert allowed == []
    assert db.execute("TABLE autoembed.pipeline").fetchall() == before


@pytest.mark.parametrize(
    "statement", ["UPDATE autoembed.pipeline SET paused = true", "UPDATE autoembed.pipeline SET ended = true"]
)
def test_a_statement_on_the_list_of_tables_reaches_the_callers_own(
    db: Connection, tables: dict[str, str], people: dict[str, str], connect: Connect, statement: str
) -> None:
    assert connect(user=people["alice"]).execute(statement.encode()).rowcount == 1

    [bob] = db.execute(
        "SELECT paused FROM autoembed.pipeline WHERE table_id = %s::regclass", [tables["bob"]]
    ).fetchall()
    assert bob == (False,)


def test_whoever_has_the_owners_rights_has_them_here_too(
    db: Connection, tables: dict[str, str], people: dict[str, str], connect: Connect
) -> None:
    db.execute(f"GRANT {people['bob']} TO {people['alice']}")

    alice = connect(user=people["alice"])

    assert tables_in(alice, "status") == {"alice_notes", "bob_notes"}
    [row] = alice.execute("SELECT content FROM autoembed.preview(%s::regclass, '1')", [tables["bob"]]).fetchall()
    assert row.content == "bob's secret"
    alice.execute("SELECT autoembed.pause(%s::regclass)", [tables["bob"]])


def test_rights_that_are_taken_back_are_gone(
    db: Connection, tables: dict[str, str], people: dict[str, str], connect: Connect
) -> None:
    db.execute(f"ALTER TABLE {tables['alice']} OWNER TO {people['bob']}")

    alice = connect(user=people["alice"])

    assert tables_in(alice, "status") == tables_in(alice, "pipeline", "table_id") == set()
    assert tables_in(connect(user=people["bob"]), "status") == {"alice_notes", "bob_notes"}


# Where keys never are -------------------------------------------------------------------------------

MARK = "x7Qm4vT9zR"
KEYS = {"env": f"sk-env-{MARK}", "file": f"sk-file-{MARK}", "vault": f"sk-vault-{MARK}"}


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that logs all that it can, with statistics of statements, pg_cron, a lane, and marked keys."""
    with ExitStack() as stack:
        server = run_server(
            stack,
            *("-c", "shared_preload_libraries=pg_cron,pg_stat_statements", "-c", "pg_stat_statements.track=all"),
            *("-c", "log_statement=all", "-c", "log_error_verbosity=verbose"),
            AUTOEMBED_LANES="1",
            OPENAI_API_KEY=KEYS["env"],
        )
        for kind in ("file", "vault"):
            path = tmp_path_factory.mktemp("keys") / f"{kind}_key"
            path.write_text(KEYS[kind])
            path.chmod(0o644)
            put_file(server.container, path, "/tmp")
        with server.connect() as db:
            # Not from the start: at debug3 PostgreSQL then logs its own environment.
            db.execute("ALTER SYSTEM SET log_min_messages = debug5")
            db.execute("SELECT pg_reload_conf()")
            wait_until(lambda: db.execute("SHOW log_min_messages").fetchone() == ("debug5",))
        yield server


def output_of(server: Server, *command: str) -> str:
    code, output = server.container.get_wrapped_container().exec_run([*command])
    assert code == 0, output.decode()[-2000:]
    return str(output.decode(errors="replace"))


def places(db: Connection, server: Server) -> dict[str, str]:
    """Everything that can be read of the database, by where it is read."""
    relations = db.execute(
        "SELECT c.oid::regclass::text AS name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'v', 'm', 'p')"
        "   AND n.nspname IN ('autoembed', 'pgmq', 'cron', 'public', 'pg_catalog')"
        # The test's own table, the lists of each file of the server, and the functions that fail in a container.
        "   AND c.relname NOT IN ('pg_hba_file_rules', 'pg_ident_file_mappings', 'pg_backend_memory_contexts',"
        "                         'pg_shmem_allocations_numa')"
    ).fetchall()
    found = {}
    for row in relations:
        # Looked for by its reverse, so that this statement does not say it.
        rows = db.execute(
            f"SELECT t::text AS line FROM {row.name} AS t WHERE strpos(t::text, reverse(%s)) > 0", [MARK[::-1]]
        )
        found[row.name] = str(rows.fetchall())
    found["pg_dump"] = output_of(server, "pg_dump", "--username=postgres", "postgres")
    found["pg_dumpall"] = output_of(server, "pg_dumpall", "--username=postgres", "--globals-only")
    found["log"] = server.container.get_wrapped_container().logs().decode(errors="replace")
    return found


def test_a_key_is_in_no_table_dump_log_error_or_statistics(talkative: Server) -> None:
    apis = {kind: talkative.fake_api(f"keys_{kind}") for kind in KEYS}
    said: list[str] = []
    with talkative.connect() as db, warnings_of(db) as heard:
        db.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        db.execute("CREATE SCHEMA vault")
        # The key is read from a file, so that the function's definition does not hold it.
        db.execute(
            "CREATE VIEW vault.decrypted_secrets AS"
            " SELECT 'marked' AS name, pg_read_file('/tmp/vault_key') AS decrypted_secret"
        )
        references = {"env": "env:OPENAI_API_KEY", "file": "file:/tmp/file_key", "vault": "vault:marked"}
        for kind, reference in references.items():
            db.execute(f"CREATE TABLE {kind}_notes (id int PRIMARY KEY, content text)")
            db.execute(
                "SELECT autoembed.create_model(%s, 'openai', 1536, model_id => %s, base_url => %s, api_key => %s)",
                [kind, MODEL, apis[kind].base_url, reference],
            )
            db.execute(
                f"SELECT autoembed.enable('{kind}_notes', 'embedding', content_columns => '{{content}}',"
                f" model => '{kind}')"
            )

        # All goes well, then a provider repeats the key wherever it can.
        for number in range(7):
            for kind, key in KEYS.items():
                faults: list[dict[str, Any]] = [
                    {},
                    {"echo_authorization": True, "times": "forever"},
                    {"status": 500, "body": f"no: {key}", "times": "forever"},
                    {
                        "status": 400,
                        "body": {"error": {"message": f"Bearer {key}"}},
                        "match": "text",
                        "times": "forever",
                    },
                    {"status": 429, "body": {"error": {"code": key}}, "headers": {"X-Key": key}, "times": "forever"},
                    {"redirect": f"http://127.0.0.1:1/{key}", "times": "forever"},
                    {"not_json": True, "times": "forever"},
                ]
                apis[kind].behave(faults=[faults[number]] if faults[number] else [])
                db.execute(f"SELECT autoembed.resume_model('{kind}')")
                db.execute(f"INSERT INTO {kind}_notes VALUES ({number}, 'text {number}')")
                try:
                    db.execute(f"SELECT autoembed.embed('question {number}', '{kind}')")
                except psycopg.Error as error:
                    said.append(
                        f"{error}\n{error.diag.message_detail}\n{error.diag.message_hint}\n{error.diag.context}"
                    )
            said.append(str(db.execute("SELECT * FROM autoembed.doctor()").fetchall()))
            said.append(str(db.execute("SELECT * FROM autoembed.process()").fetchall()))
            said.append(str(db.execute("TABLE autoembed.model_rest").fetchall()))
        said.append(str(db.execute("TABLE autoembed.failed").fetchall()))

        # The lane's session, seen while it has a request in flight.
        for kind, api in apis.items():
            api.behave(hold=True)
            db.execute(f"INSERT INTO {kind}_notes VALUES (99, 'held')")
        # The answer to a request that was in flight may let a model rest once more.
        wait_until(
            lambda: all(
                db.execute("SELECT autoembed.resume_model(%s)", [kind]) and api.counters()["held"]
                for kind, api in apis.items()
            )
        )
        activity = str(db.execute("SELECT a::text FROM pg_stat_activity AS a").fetchall())
        for api in apis.values():
            api.release()
        found = places(db, talkative)

    assert "CALL autoembed.work()" in activity
    # They were found, and used.
    assert [api.log()[0]["status"] for api in apis.values()] == [200, 200, 200]
    found |= {"pg_stat_activity at work": activity, "errors": "\n".join(said), "notices": "\n".join(heard)}
    assert len(said) > 20 and "pg_stat_statements" in found and "cron.job_run_details" in found
    # The test's own orders to the database name no key, so nothing does.
    seen = {place: [line for line in text.splitlines() if MARK in line] for place, text in found.items()}
    assert {place: lines[:5] for place, lines in seen.items() if lines} == {}


def test_a_key_pasted_in_place_of_its_reference_is_not_repeated(db: Connection) -> None:
    for call in ("create_model('m', 'openai', 3, ", f"alter_model('{MODEL}', "):
        with warnings_of(db) as heard, pytest.raises(psycopg.Error) as caught:
            db.execute(f"SELECT autoembed.{call}api_key => %s)", [KEYS["env"]])
        assert MARK not in f"{caught.value} {caught.value.diag.message_detail} {caught.value.diag.context} {heard}"


# docs/security.md -----------------------------------------------------------------------------------


def test_a_lane_without_superuser_works_with_the_grants_of_the_document(talkative: Server, tmp_path: Path) -> None:
    api = talkative.fake_api("lane")
    with talkative.connect() as db:
        db.execute(
            "DROP EXTENSION autoembed CASCADE; DROP TABLE IF EXISTS before, after; CREATE EXTENSION autoembed CASCADE"
        )
        db.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
        db.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
        db.execute("CREATE ROLE owner")
        db.execute("SELECT autoembed.grant_usage('owner')")
        db.execute("CREATE TABLE before (id int PRIMARY KEY, content text); ALTER TABLE before OWNER TO owner")
        db.execute("INSERT INTO before SELECT n, 'old ' || n FROM generate_series(1, 5) AS n")
        db.execute("SELECT autoembed.enable('before', 'embedding', content_columns => '{content}')")

        for number, sql in enumerate(SQL_BLOCKS):
            script = tmp_path / f"security_{number}.sql"
            script.write_text(sql, encoding="utf-8")
            put_file(talkative.container, script, "/tmp")
            output_of(talkative, "psql", "--username=postgres", "--set=ON_ERROR_STOP=1", f"--file=/tmp/{script.name}")

        lanes = "SELECT DISTINCT a.usename::text FROM autoembed.lane AS l JOIN pg_stat_activity AS a USING (pid)"
        # Those that ran before may take a moment to end.
        wait_until(lambda: db.execute(lanes).fetchall() == [("lane",)])
        db.execute("CREATE TABLE after (id int PRIMARY KEY, content text)")
        db.execute(
            "SELECT autoembed.enable('after', 'embedding', content_columns => '{content}', condition => 'id <> 3')"
        )
        api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}, {"status": 503}])
        db.execute("INSERT INTO after VALUES (1, 'one'), (2, 'poison'), (3, 'not wanted'), (4, 'four')")
        db.execute("DELETE FROM after WHERE id = 4; UPDATE before SET content = 'changed' WHERE id = 1")
        db.execute("TRUNCATE after; INSERT INTO after VALUES (1, 'one'), (2, 'poison'), (3, 'no')")
        # One row of the second table is given up.
        for table, all_are_fresh in (("before", True), ("after", False)):
            assert db.execute(f"SELECT autoembed.wait_until_fresh('{table}', 30)").fetchone() == (all_are_fresh,)

        assert db.execute("SELECT count(*) FROM before WHERE embedding IS NULL").fetchone() == (0,)
        assert db.execute("SELECT id FROM after WHERE embedding IS NOT NULL").fetchall() == [(1,)]
        assert db.execute("SELECT key FROM autoembed.failed").fetchall() == [("[2]",)]
        assert db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = 'lane'").fetchone() == (False,)
        db.execute(f"ALTER ROLE lane PASSWORD '{PASSWORD}'")
        with talkative.connect(user="lane") as lane:
            for forbidden in (
                "TABLE before",
                "UPDATE after SET content = 'mine'",
                "TABLE autoembed.model",
                "TABLE pgmq.q_embedding_jobs",
                f"SELECT autoembed.alter_model('{MODEL}', base_url => 'https://elsewhere.example')",
                "SELECT autoembed.schedule()",
                "SELECT pg_read_file('/tmp/file_key')",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    lane.execute(forbidden.encode())
