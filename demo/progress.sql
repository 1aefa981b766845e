-- progress.sql: polls :table until all its rows have embeddings, 2 minutes at most; each time "@ embedded rows milliseconds".
SELECT clock_timestamp() AS start, (120 / :interval)::integer AS polls \gset
\set progress 'SELECT ''@'', e.embedded, r.rows, (1000 * extract(epoch FROM clock_timestamp() - :''start''))::integer FROM (SELECT ' :embedded ' AS embedded) AS e, (SELECT count(*) AS rows FROM ' :table ') AS r'
\pset tuples_only on
\pset format unaligned
\pset fieldsep ' '
:progress WHERE e.embedded < r.rows AND NOT EXISTS (SELECT FROM autoembed.failed) AND NOT EXISTS (SELECT FROM autoembed.model_rest)
\watch interval=:interval count=:polls min_rows=1
:progress;
