-- Prints docs/reference.md: the public functions, views and tables of the installed extension, with their COMMENTs.
\pset tuples_only on
\pset format unaligned
\pset recordsep '\n\n'

SELECT $$# Reference

<!-- `make reference` writes this page out of the COMMENTs in sql/. Change it there. -->

These sentences are in the database too: `\df+ autoembed.*`, `\d+ autoembed.status`. Names that begin with `_` are
private. Arguments can be given by name: `model => 'large'`.
$$;

WITH section (section_number, title, functions) AS (
    VALUES
    (1, 'Tables and their embeddings', '{enable,alter_pipeline,disable,pause,resume,resync,reembed,wait_until_fresh}'),
    (2, 'Search', '{search,search_rows,embed_query,embed,create_match_function,measure_recall,tune,evaluate_search,
        reset_search_stats}'),
    (3, 'Models', '{create_model,create_rerank_model,alter_model,set_default_model,resume_model,drop_model,
        allow_http_host}'),
    (4, 'Before and after', '{estimate,preview,chunk_text,doctor,retry_failed}'),
    (5, 'Lanes', '{schedule,unschedule,work,process}'),
    (6, 'Rights', '{grant_usage,grant_monitor,grant_lane}'),
    (7, 'Triggers of the Supabase guide', '{queue_embeddings,clear_column}')
),

placed AS (
    SELECT
        p.oid, p.proname, p.prokind, p.pronargs, p.proallargtypes, p.proargnames, p.proargmodes,
        coalesce(s.section_number, 8) AS section_number,
        coalesce(s.title, 'Others') AS title,
        array_position(s.functions::name[], p.proname) AS place,
        -- Overloads: the one for a row of the table first.
        pg_get_function_identity_arguments(p.oid) AS arguments
    FROM pg_proc AS p
    LEFT JOIN section AS s ON p.proname = ANY (s.functions::name[])
    WHERE p.pronamespace = 'autoembed'::regnamespace AND p.proname !~ '^_'
),

described AS (
    SELECT
        p.*,
        regexp_replace(pg_get_function_arguments(p.oid), '::[a-z ]+(\[\])?|\mIN |,? ?\mOUT .*', '', 'g') AS signature,
        -- The type of the result, unless it is a row of columns.
        (SELECT r.result FROM pg_get_function_result(p.oid) AS r (result)
         WHERE r.result <> 'record' AND r.result NOT LIKE 'TABLE(%') AS result,
        (SELECT string_agg(format('`%s` %s', a.name, format_type(a.type, NULL)), ', ' ORDER BY a.n)
         FROM unnest(p.proargnames, p.proallargtypes, p.proargmodes) WITH ORDINALITY AS a (name, type, mode, n)
         WHERE a.mode IN ('o', 't')) AS columns
    FROM placed AS p
)

SELECT
    CASE WHEN row_number() OVER (PARTITION BY d.section_number ORDER BY d.place, d.arguments) = 1
        THEN format(E'## %s\n\n', d.title) ELSE '' END
    || CASE WHEN row_number() OVER (PARTITION BY d.proname ORDER BY d.arguments) = 1
        THEN format(E'### %s\n\n', d.proname) ELSE '' END
    || format(
        E'```\n%s%s(%s)%s\n```\n\n%s',
        CASE WHEN d.prokind = 'p' THEN 'CALL ' ELSE '' END,
        'autoembed.' || d.proname,
        CASE WHEN length(d.signature) > 70
            THEN E'\n    ' || regexp_replace(d.signature, ', (?=\w+ )', E',\n    ', 'g') || E'\n' ELSE d.signature END,
        ' RETURNS ' || d.result,
        obj_description(d.oid, 'pg_proc')
    )
    || coalesce(E'\n\nColumns: ' || d.columns || '.', '')
FROM described AS d
ORDER BY d.section_number, d.place, d.proname, d.arguments;

SELECT
    CASE WHEN row_number() OVER (PARTITION BY c.relkind ORDER BY c.relname) = 1
        THEN CASE c.relkind
            WHEN 'v' THEN E'## Views\n\n'
            ELSE E'## Tables\n\nTo read. The functions above write them.\n\n'
        END
        ELSE '' END
    || format(
        E'### `autoembed.%s`\n\n%s\n\n| column | type | |\n|---|---|---|\n%s',
        c.relname,
        obj_description(c.oid, 'pg_class'),
        (SELECT string_agg(format(
            '| `%s` | %s | %s |', a.attname, format_type(a.atttypid, a.atttypmod),
            replace(coalesce(col_description(c.oid, a.attnum), ''), '|', '\|')
        ), E'\n' ORDER BY a.attnum)
         FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
    )
FROM pg_class AS c
WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v') AND c.relname !~ '^_'
ORDER BY c.relkind DESC, c.relname;
