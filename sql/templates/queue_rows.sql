-- Most statements change few rows. To number these would cost half as much again.
        INSERT INTO autoembed._job (due_at, message)
        SELECT pg_catalog.clock_timestamp(), pg_catalog.concat(
                   '{"pipeline": {{id}}, "keys": [', pg_catalog.string_agg(k.key, ','), ']{{said_of_rows}}}'
               )::pg_catalog.jsonb
        FROM (SELECT r.key FROM ({{rows}}) AS r LIMIT {{keys_per_message}} OPERATOR(pg_catalog.+) 1) AS k
        HAVING pg_catalog.count(*) OPERATOR(pg_catalog.>=) 1
           AND pg_catalog.count(*) OPERATOR(pg_catalog.<=) {{keys_per_message}}
           AND pg_catalog.sum(pg_catalog.octet_length(k.key)) OPERATOR(pg_catalog.<=) {{bytes_per_message}};
        IF NOT FOUND THEN
            INSERT INTO autoembed._job (due_at, message)
            SELECT pg_catalog.clock_timestamp(), pg_catalog.concat(
                       '{"pipeline": {{id}}, "keys": [', pg_catalog.string_agg(k.key, ','), ']{{said_of_rows}}}'
                   )::pg_catalog.jsonb
            FROM (
                SELECT r.key, (pg_catalog.row_number() OVER () OPERATOR(pg_catalog.-) 1)
                           OPERATOR(pg_catalog./) {{keys_per_message}} AS number,
                       pg_catalog.sum(pg_catalog.octet_length(r.key)) OVER (ROWS UNBOUNDED PRECEDING)
                           OPERATOR(pg_catalog./) {{bytes_per_message}} AS part
                FROM ({{rows}}) AS r
            ) AS k
            GROUP BY k.number, k.part;
        END IF;
