-- functions.sql: a table for the descriptions of Postgres' own functions.
CREATE TABLE functions (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    arguments text NOT NULL,
    description text NOT NULL
);

SELECT autoembed.enable('functions',
    content_template => '{description} ({name})', text_config => 'english');
