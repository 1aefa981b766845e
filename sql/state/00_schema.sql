CREATE SCHEMA autoembed;
COMMENT ON SCHEMA autoembed IS
    'Keeps embeddings in step with their rows. Names that begin with _ are private.';
