-- documents.sql: a table, and the one call that keeps its embeddings.
CREATE TABLE documents (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    title text NOT NULL,
    content text NOT NULL
);

SELECT autoembed.enable('documents', 'embedding',
    content_template => E'# {title}\n\n{content}', on_change => 'clear');
