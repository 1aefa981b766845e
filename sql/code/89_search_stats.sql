-- Counts of searches by pipeline. _note_search() writes them.

CREATE OR REPLACE FUNCTION autoembed._search_stats()
    RETURNS TABLE (
        pipeline_id integer,
        calls bigint,
        p50_ms double precision,
        p95_ms double precision,
        exact bigint,
        by_index bigint,
        short bigint,
        empty bigint,
        from_cache bigint,
        fell_back bigint,
        since double precision
    )
    LANGUAGE plpython3u
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.search_stats()
$python$;
COMMENT ON FUNCTION autoembed._search_stats IS
    'The figures of searches of the tables that the caller owns or monitors. since: in seconds since 1970.';

CREATE OR REPLACE VIEW autoembed.search_stats WITH (security_barrier) AS
SELECT p.table_id::text AS table_name, p.embedding_column, s.calls, s.p50_ms, s.p95_ms, s.exact, s.by_index, s.short,
       s.empty AS nothing_found, s.from_cache AS cache_hits, s.fell_back AS rerank_fallbacks,
       to_timestamp(s.since) AS since
FROM autoembed.pipeline AS p
JOIN autoembed._search_stats() AS s ON s.pipeline_id = p.id
WHERE autoembed._may_see(p.table_id);
COMMENT ON VIEW autoembed.search_stats IS
    'Searches of each embedding column on this server, since reset_search_stats() or the first of them.';
COMMENT ON COLUMN autoembed.search_stats.table_name IS 'Attached table.';
COMMENT ON COLUMN autoembed.search_stats.embedding_column IS 'Column that holds the embeddings.';
COMMENT ON COLUMN autoembed.search_stats.calls IS 'Number of searches that gave an answer.';
COMMENT ON COLUMN autoembed.search_stats.p50_ms IS
    'Time that half of them took at most, in milliseconds, exact to a tenth. The wait for models counts.';
COMMENT ON COLUMN autoembed.search_stats.p95_ms IS 'Time that 95 % of them took at most.';
COMMENT ON COLUMN autoembed.search_stats.exact IS 'Number of those that compared all rows that match.';
COMMENT ON COLUMN autoembed.search_stats.by_index IS
    'Number of those that asked a vector index. Searches by words alone are neither.';
COMMENT ON COLUMN autoembed.search_stats.short IS 'Number of those that found fewer than max_rows rows.';
COMMENT ON COLUMN autoembed.search_stats.nothing_found IS 'Number of those that found no row.';
COMMENT ON COLUMN autoembed.search_stats.cache_hits IS
    'Number of those whose session had the embedding of the same text already.';
COMMENT ON COLUMN autoembed.search_stats.rerank_fallbacks IS
    'Number of those whose rerank model gave no scores, so that the rows kept their order.';
COMMENT ON COLUMN autoembed.search_stats.since IS 'When the count began.';

CREATE OR REPLACE FUNCTION autoembed._reset_search_stats(table_id oid)
    RETURNS void
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    doors.reset_search_stats(table_id)
$python$;
COMMENT ON FUNCTION autoembed._reset_search_stats IS 'Does the work of reset_search_stats().';

CREATE OR REPLACE FUNCTION autoembed.reset_search_stats(table_name regclass DEFAULT NULL)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF table_name IS NOT NULL THEN
        table_name := (autoembed._owned_pipelines(table_name, NULL))[1].table_id;
    END IF;
    PERFORM autoembed._reset_search_stats(table_name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.reset_search_stats IS
    'Begins the figures of search_stats again: of a table that the caller owns, or of all of them.';
