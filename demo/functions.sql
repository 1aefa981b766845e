-- functions.sql: a table for the descriptions of Postgres' own functions, with triggers like those of documents.
CREATE TABLE functions (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    arguments text NOT NULL,
    description text NOT NULL,
    embedding halfvec(384)
);

CREATE FUNCTION function_input(function functions) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT function.description || ' (' || function.name || ')';
$$;

CREATE TRIGGER embed_functions_on_insert
    AFTER INSERT ON functions
    FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('function_input', 'embedding');

CREATE TRIGGER embed_functions_on_update
    AFTER UPDATE OF name, description ON functions
    FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('function_input', 'embedding');

CREATE TRIGGER clear_function_embedding_on_update
    BEFORE UPDATE OF name, description ON functions
    FOR EACH ROW EXECUTE FUNCTION autoembed.clear_column('embedding');
