-- documents.sql: the guide's table, its content function, its triggers.
CREATE TABLE documents (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    title text NOT NULL,
    content text NOT NULL,
    embedding halfvec(384),
    created_at timestamp with time zone DEFAULT now()
);
CREATE INDEX ON documents USING hnsw (embedding halfvec_cosine_ops);

CREATE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN '# ' || doc.title || E'\n\n' || doc.content;
END;
$$;

CREATE TRIGGER embed_documents_on_insert
    AFTER INSERT ON documents
    FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('embedding_input', 'embedding');

CREATE TRIGGER embed_documents_on_update
    AFTER UPDATE OF title, content ON documents
    FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('embedding_input', 'embedding');

CREATE TRIGGER clear_document_embedding_on_update
    BEFORE UPDATE OF title, content ON documents
    FOR EACH ROW EXECUTE FUNCTION autoembed.clear_column('embedding');
