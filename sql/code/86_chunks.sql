-- Long texts are cut into chunks here.

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
    model text,
    pieces text[]
)
    RETURNS TABLE (
        chunk_start integer,
        chunk_end integer,
        token_count integer,
        chunk text,
        problem text,
        hint text,
        errcode text
    )
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.chunks(content, chunking, chunk_size, chunk_overlap, model, pieces)
$python$;
COMMENT ON FUNCTION autoembed._chunks IS
    'The chunks of a text in their order, or why it cannot be cut. The arguments are those that _chunk_size() has '
    'checked, and the pieces that a function gives.';

-- Any role may run it, by the view of chunks, and has perhaps no right to load the modules.
CREATE OR REPLACE FUNCTION autoembed._part_of_long_text(
    version text,
    content text,
    chunk_start integer,
    chunk_end integer
)
    RETURNS text
    LANGUAGE plpython3u
    STABLE
    PARALLEL RESTRICTED
    SET search_path = pg_catalog, pg_temp
AS $python$
    if "plan" not in SD:
        SD["plan"] = plpy.prepare("SELECT current_user::text AS role, statement_timestamp()::text AS began_at")
    [now] = plpy.execute(SD["plan"])
    of = version, now["role"], now["began_at"]
    size = 1 << 16
    if content is not None:
        GD["autoembed_long_text"] = of, [content[at : at + size].encode() for at in range(0, len(content), size)]
    kept_of, windows = GD.get("autoembed_long_text", (None, []))
    # Another role, or a later statement, may have no right to the text.
    if kept_of != of:
        return None
    first = chunk_start // size
    text = b"".join(windows[first : chunk_end // size + 1]).decode()
    return text[chunk_start - first * size : chunk_end - first * size]
$python$;
COMMENT ON FUNCTION autoembed._part_of_long_text IS
    'A part of a long text, which is kept in the session for its other chunks. content: NULL: it was given before, in '
    'this statement and by this role; otherwise the answer is NULL. version: tells the row in its present version from '
    'others.';

CREATE OR REPLACE FUNCTION autoembed._chunk_text(
    content text,
    chunking text,
    chunk_size integer,
    chunk_overlap integer,
    model text,
    pieces text[]
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
    _chunk record;
BEGIN
    _size := autoembed._chunk_size(chunking, chunk_size, chunk_overlap, _model);
    IF _size.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _size.problem, HINT = _size.hint, ERRCODE = _size.errcode;
    END IF;
    FOR _chunk IN
        SELECT c.* FROM autoembed._chunks(content, chunking, _size.tokens, chunk_overlap, _model, pieces)
            WITH ORDINALITY AS c(start, stop, tokens, chunk, problem, hint, errcode, number)
    LOOP
        IF _chunk.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _chunk.problem, HINT = _chunk.hint, ERRCODE = _chunk.errcode;
        END IF;
        chunk_number := _chunk.number;
        chunk_start := _chunk.start;
        chunk_end := _chunk.stop;
        token_count := _chunk.tokens;
        chunk := _chunk.chunk;
        RETURN NEXT;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._chunk_text IS 'Does the work of chunk_text(). pieces: those that a function gives.';

-- A function that cuts is the caller's choice. It runs with the rights of the caller and is found in the caller's
-- search_path, so all else in this function is qualified.
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
AS $plpgsql$
DECLARE
    _way CONSTANT pg_catalog.record := autoembed._chunking(chunking);
    _function pg_catalog.regproc;
    _pieces pg_catalog.text[];
BEGIN
    IF _way.chunk_function IS NOT NULL THEN
        SELECT p.oid INTO _function
        FROM pg_catalog.pg_proc AS p
        WHERE p.oid OPERATOR(pg_catalog.=) pg_catalog.to_regprocedure(pg_catalog.concat(
                  pg_catalog.regexp_replace(chunking, '[(]text[)]$', ''), '(pg_catalog.text)'
              ))
          AND p.proretset;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING
                ERRCODE = 'undefined_function',
                MESSAGE = pg_catalog.format(
                    'chunking "%s" is not known, and there is no such function of a text that returns texts', chunking
                ),
                HINT = pg_catalog.format(
                    'It is structure, tokens, none, or a function: CREATE FUNCTION %s(text) RETURNS SETOF text.',
                    chunking
                );
        END IF;
        EXECUTE pg_catalog.format('SELECT pg_catalog.array_agg(p.piece) FROM %s($1) AS p(piece)', _function)
        INTO _pieces USING content;
    END IF;
    -- The loop keeps this statement out of the CONTEXT of a refusal.
    FOR chunk_number, chunk_start, chunk_end, token_count, chunk IN
        SELECT c.* FROM autoembed._chunk_text(content, _way.way, chunk_size, chunk_overlap, model, _pieces) AS c
    LOOP
        RETURN NEXT;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.chunk_text IS
    'Shows how a text is cut into chunks; nothing is stored or sent. chunking: structure (at headings, paragraphs and '
    'sentences), tokens (as long as may be), none, or the name of a function of a text that returns texts, which runs '
    'with the rights of the caller. chunk_size: the most tokens of a chunk, by default those that suit the model. '
    'chunk_overlap: tokens of the chunk before with which a chunk begins. chunk_start, chunk_end: the numbers of '
    'characters before the chunk and up to its end. token_count: by the tokenizer of a local model, otherwise '
    'estimated.';
