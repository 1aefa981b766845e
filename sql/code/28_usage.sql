-- Usage: requests, texts, tokens and cost, by model and table.

CREATE OR REPLACE FUNCTION autoembed._note_usage(
    model text,
    pipeline_ids integer[],
    requests integer[],
    inputs integer[],
    tokens bigint[],
    rows integer[],
    slot integer
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF slot IS NOT NULL THEN
        PERFORM autoembed._free_slots(_note_usage.model, ARRAY[slot]);
    END IF;
    -- embed() works in these too.
    IF NOT current_setting('transaction_read_only')::boolean THEN
        INSERT INTO autoembed.usage_entry (model, pipeline_id, requests, inputs, tokens, rows)
        SELECT _note_usage.model, u.pipeline_id, u.requests, u.inputs, u.tokens, u.rows
        FROM unnest(pipeline_ids, _note_usage.requests, _note_usage.inputs, _note_usage.tokens, _note_usage.rows)
            AS u(pipeline_id, requests, inputs, tokens, rows);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._note_usage IS
    'Notes a request that was answered, with a row for each pipeline that had texts in it, and frees its slot.';

CREATE OR REPLACE FUNCTION autoembed._fold_usage()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF (SELECT min(u.at) FROM autoembed.usage_entry AS u) < clock_timestamp() - interval '10 minutes' THEN
        PERFORM FROM autoembed.turn AS t WHERE t.name = 'usage' FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN;
        END IF;
        -- The last minutes stay one by one: rates are read from them.
        WITH folded AS (
            DELETE FROM autoembed.usage_entry AS u WHERE u.at < clock_timestamp() - interval '5 minutes' RETURNING u.*
        )
        INSERT INTO autoembed.usage_day AS d (day, model, pipeline_id, requests, inputs, tokens, rows)
        SELECT (f.at AT TIME ZONE 'UTC')::date, f.model, f.pipeline_id,
               sum(f.requests), sum(f.inputs), sum(f.tokens), sum(f.rows)
        FROM folded AS f
        GROUP BY 1, 2, 3
        ON CONFLICT (day, model, pipeline_id) DO UPDATE
        SET requests = d.requests + excluded.requests, inputs = d.inputs + excluded.inputs,
            tokens = d.tokens + excluded.tokens, rows = d.rows + excluded.rows;
    END IF;
    PERFORM autoembed._forget_permits();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._fold_usage IS
    'Adds up the requests of each day, except those of the last minutes, and forgets their permits.';

CREATE OR REPLACE VIEW autoembed.usage AS
SELECT u.day,
       u.model,
       p.table_id::text AS table_name,
       p.embedding_column,
       sum(u.requests)::bigint AS requests,
       sum(u.inputs)::bigint AS inputs,
       sum(u.tokens)::bigint AS tokens,
       round(sum(u.tokens) * m.price_per_million_tokens / 1000000, 6) AS cost
FROM (
    SELECT d.day, d.model, d.pipeline_id, d.requests, d.inputs, d.tokens FROM autoembed.usage_day AS d
    UNION ALL
    SELECT (e.at AT TIME ZONE 'UTC')::date, e.model, e.pipeline_id, e.requests, e.inputs, e.tokens
    FROM autoembed.usage_entry AS e
) AS u
LEFT JOIN autoembed.pipeline AS p ON p.id = u.pipeline_id
LEFT JOIN autoembed.model AS m ON m.name = u.model
GROUP BY u.day, u.model, u.pipeline_id, p.table_id, p.embedding_column, m.price_per_million_tokens;
COMMENT ON VIEW autoembed.usage IS
    'Requests, texts and tokens per day (UTC), model and embedding column, and their cost at the model''s price.';
COMMENT ON COLUMN autoembed.usage.day IS 'The day, in UTC.';
COMMENT ON COLUMN autoembed.usage.model IS 'The model.';
COMMENT ON COLUMN autoembed.usage.table_name IS
    'The table. NULL for embed(), and for tables that are no longer embedded.';
COMMENT ON COLUMN autoembed.usage.embedding_column IS 'The column.';
COMMENT ON COLUMN autoembed.usage.requests IS 'Requests that were answered.';
COMMENT ON COLUMN autoembed.usage.inputs IS 'Texts in them.';
COMMENT ON COLUMN autoembed.usage.tokens IS 'Tokens as the provider counted them, or as estimated where it does not.';
COMMENT ON COLUMN autoembed.usage.cost IS 'Tokens at the model''s price_per_million_tokens; NULL where none is set.';

CREATE OR REPLACE FUNCTION autoembed._price_and_rate(model text, OUT price numeric, OUT rows_per_second numeric)
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT m.price_per_million_tokens,
           (SELECT max(u.rows) / 60.0
            FROM (
                SELECT sum(e.rows) AS rows
                FROM autoembed.usage_entry AS e
                WHERE e.model = m.name
                GROUP BY date_trunc('minute', e.at)
            ) AS u)
    FROM autoembed.model AS m
    WHERE m.name = _price_and_rate.model;
$sql$;
COMMENT ON FUNCTION autoembed._price_and_rate IS
    'What a model costs, and the rows a second in its busiest recent minute; NULL: nothing known.';
