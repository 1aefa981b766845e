-- documents_rows.sql: six paragraphs on Postgres.
INSERT INTO documents (title, content) VALUES
    ('Row versions',
     'An UPDATE does not overwrite a row: it writes a new version and leaves the old one for the transactions that '
     'still see it. So readers never block writers, and writers never block readers.'),
    ('VACUUM',
     'Row versions that no transaction can see any more are dead weight. VACUUM marks their space as free for new '
     'rows; the autovacuum daemon runs it where enough rows have changed.'),
    ('Point-in-time recovery',
     'A base backup and the archived write-ahead log together bring a cluster back to any moment after the backup, '
     'for example to the second before somebody dropped the wrong table.'),
    ('Row-level security',
     'Policies decide, for each user, which rows of a table a query returns and which it may change. Superusers and '
     'roles with BYPASSRLS are exempt.'),
    ('LISTEN and NOTIFY',
     'A session that listens on a channel is told, right after commit, when another session sends a message there. '
     'Applications need not ask again and again whether something new has come.'),
    ('Partitioning',
     'A large table can be split by ranges of a key, such as one part for each month. A query that names the month '
     'reads only that part, and old months go away with a quick DROP TABLE.')
RETURNING id, title, embedding;
