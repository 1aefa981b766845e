-- manual.sql: one long text, of the six paragraphs; only the passage that answers is wanted.
CREATE TABLE manuals (name text PRIMARY KEY, body text);

SELECT autoembed.enable('manuals',
    content_columns => '{body}', chunk_size => 80);

INSERT INTO manuals
SELECT 'PostgreSQL in one page',
       string_agg(format(E'# %s\n\n%s', title, content), E'\n\n' ORDER BY id)
FROM documents;
