-- Usage: requests, texts and tokens, by model and table.

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

CREATE OR REPLACE FUNCTION autoembed._price_and_rate(
    model text,
    OUT price numeric,
    OUT rows_per_second numeric,
    OUT tokens_per_request double precision
)
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
            ) AS u),
           (SELECT sum(u.tokens::double precision * u.tokens / u.requests) / nullif(sum(u.tokens), 0)
            FROM (
                SELECT e.tokens, e.requests, e.pipeline_id FROM autoembed.usage_entry AS e WHERE e.model = m.name
                UNION ALL
                SELECT d.tokens, d.requests, d.pipeline_id FROM autoembed.usage_day AS d WHERE d.model = m.name
            ) AS u
            WHERE u.requests > 0 AND u.pipeline_id IS NOT NULL)
    FROM autoembed.model AS m
    WHERE m.name = _price_and_rate.model;
$sql$;
COMMENT ON FUNCTION autoembed._price_and_rate IS
    'What a model costs, the rows a second in its busiest recent minute, and the tokens of a usual request; NULL: '
    'nothing known.';
