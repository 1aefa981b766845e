-- search.sql: the five functions whose descriptions come nearest to :query.

-- Hundreds of these descriptions are alike ("I/O"); at its default, 40, the search may not get past them.
SET hnsw.ef_search = 200;

SELECT row_number() OVER () AS rank, nearest.*
FROM (
    SELECT format('%s(%s)', name, arguments) AS function,
           left(description, 60) AS description,
           round((1 - (embedding <=> autoembed.embed(:'query')))::numeric, 2) AS similarity
    FROM functions
    ORDER BY embedding <=> autoembed.embed(:'query')
    LIMIT 5
) AS nearest;
