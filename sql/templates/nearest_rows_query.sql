-- The query of nearest_rows.sql. One window for the rank and the count takes half as long as two.
SELECT h.rank, h.hit, h.key, h.similarity, {{nearest_passage}}, h.number, h.start, h.stop, h.similarity,
            NULL::pg_catalog.float8
        FROM (
            SELECT n.distance, n.place, n.compared, n.number, n.start, n.stop, n.digest, {{row_key}} AS key,
                ROW({{row_columns}})::{{row_type}} AS hit,
                1::pg_catalog.float8 OPERATOR(pg_catalog.-) n.distance AS similarity,
                (pg_catalog.row_number() OVER listed)::pg_catalog.int4 AS rank,
                pg_catalog.count(*) OVER listed AS found
            FROM {{nearest}} AS n
            JOIN {{nearest_table}} AS t ON {{is_near}}
            WINDOW listed AS (ORDER BY n.distance, n.place ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
        ) AS h
        WHERE {{are_enough}}
        ORDER BY h.distance, h.place
        OFFSET $3 LIMIT $4
