-- The query of nearest_rows.sql.
SELECT h.rank, h.hit, h.key, h.similarity, {{nearest_passage}}, h.number, h.start, h.stop, h.similarity,
            NULL::pg_catalog.float8
        FROM (
            SELECT (pg_catalog.row_number() OVER (ORDER BY f.distance, f.place))::pg_catalog.int4 AS rank,
                ROW({{found_columns}})::{{row_type}} AS hit, f.key,
                1::pg_catalog.float8 OPERATOR(pg_catalog.-) f.distance AS similarity,
                f.number, f.start, f.stop, f.digest
            FROM (
                SELECT {{row_key}}, n.distance, n.place, n.number, n.start, n.stop, n.digest,
                    n.compared, pg_catalog.count(*) OVER (), {{row_columns}}
                FROM {{nearest}} AS n
                JOIN {{nearest_table}} AS t ON {{is_near}}
            ) AS f(key, distance, place, number, start, stop, digest, compared, found, {{found_names}})
            WHERE {{are_enough}}
            ORDER BY f.distance, f.place
            OFFSET $3 LIMIT $4
        ) AS h
