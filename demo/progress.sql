-- progress.sql: polls :table until all its rows have embeddings, 5 minutes at most; each time it prints
-- "@ embedded rows milliseconds". :embedded is a subquery that counts the rows with embeddings.
SELECT clock_timestamp() AS start, (300 / :interval)::integer AS polls \gset
\set now '(1000 * extract(epoch FROM clock_timestamp() - :''start''))::integer'
\set counted '(SELECT ' :embedded ' AS embedded) AS e, (SELECT count(*) AS rows FROM ' :table ') AS r'
\set progress 'SELECT ''@'', e.embedded, r.rows, ' :now ' FROM ' :counted
\set in_trouble 'EXISTS (SELECT FROM autoembed.failed) OR EXISTS (SELECT FROM autoembed.model_rest)'
\pset tuples_only on
\pset format unaligned
\pset fieldsep ' '
:progress WHERE e.embedded < r.rows AND NOT (:in_trouble)
\watch interval=:interval count=:polls min_rows=1
:progress;
