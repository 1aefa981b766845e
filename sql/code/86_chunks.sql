-- How a long text is cut into chunks.

CREATE OR REPLACE FUNCTION autoembed._chunk_size(
    chunking text,
    chunk_size integer,
    chunk_overlap integer,
    model text,
    OUT tokens integer,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.chunk_size(chunking, chunk_size, chunk_overlap, model)
$python$;
COMMENT ON FUNCTION autoembed._chunk_size IS
    'The most tokens of a chunk for a model, by default what suits it; or why texts cannot be cut like that.';

CREATE OR REPLACE FUNCTION autoembed._chunks(
    content text,
    chunking text,
    chunk_size integer,
    chunk_overlap integer,
    model text
)
    RETURNS TABLE (chunk_start integer, chunk_end integer, token_count integer, chunk text)
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.chunks(content, chunking, chunk_size, chunk_overlap, model)
$python$;
COMMENT ON FUNCTION autoembed._chunks IS
    'The chunks of a text in their order. The arguments are those that _chunk_size() has checked.';

CREATE OR REPLACE FUNCTION autoembed.chunk_text(
    content text,
    chunking text DEFAULT 'structure',
    chunk_size integer DEFAULT NULL,
    chunk_overlap integer DEFAULT 0,
    model text DEFAULT NULL
)
    RETURNS TABLE (chunk_number integer, chunk_start integer, chunk_end integer, token_count integer, chunk text)
    LANGUAGE plpgsql
    STABLE
    PARALLEL RESTRICTED
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _model text := (autoembed._model(model)).name;
    _size record;
BEGIN
    SELECT s.* INTO _size FROM autoembed._chunk_size(chunking, chunk_size, chunk_overlap, _model) AS s;
    IF _size.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _size.problem, HINT = _size.hint, ERRCODE = _size.errcode;
    END IF;
    RETURN QUERY
        SELECT c.chunk_number::integer, c.chunk_start, c.chunk_end, c.token_count, c.chunk
        FROM autoembed._chunks(content, chunking, _size.tokens, chunk_overlap, _model) WITH ORDINALITY
            AS c(chunk_start, chunk_end, token_count, chunk, chunk_number);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.chunk_text IS
    'Shows how a text is cut into chunks; nothing is stored or sent. chunking: structure (at headings, paragraphs and '
    'sentences), tokens (as long as may be), or none. chunk_size: the most tokens of a chunk, by default those that '
    'suit the model. chunk_overlap: tokens of the chunk before with which a chunk begins. chunk_start, chunk_end: the '
    'numbers of characters before the chunk and up to its end. token_count: by the tokenizer of a local model, '
    'otherwise estimated.';
