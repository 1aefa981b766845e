-- Models whose provider is "function": SQL functions that embed or rerank, with their owner's rights.

CREATE OR REPLACE FUNCTION autoembed._embedder(
    model autoembed.model,
    purpose text,
    OUT function_name text,
    OUT arguments text,
    OUT function_id oid,
    OUT wrapper name,
    OUT problem text,
    OUT hint text,
    OUT errcode text
)
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _query_function text := CASE purpose WHEN 'query' THEN model.options ->> 'query_function' END;
    _named text := coalesce(_query_function, model.model_id);
    _types regtype[] := CASE purpose
        WHEN 'rerank' THEN ARRAY['real[]'::regtype, 'double precision[]'::regtype]
        ELSE ARRAY['@extschema:vector@.vector[]'::regtype, '@extschema:vector@.halfvec[]'::regtype]
    END;
    _parts text[];
BEGIN
    arguments := CASE purpose WHEN 'rerank' THEN '(text, text[])' ELSE '(text[])' END;
    wrapper := format('%s_%s', CASE
        WHEN purpose = 'rerank' THEN '_rerank'
        WHEN _query_function IS NULL THEN '_embed_document'
        ELSE '_embed_query'
    END, md5(model.name));
    BEGIN
        _parts := parse_ident(_named);
    EXCEPTION WHEN invalid_parameter_value THEN
        NULL;
    END;
    IF cardinality(_parts) IS DISTINCT FROM 2 THEN
        problem := format(
            'model "%s" names the function "%s", which has to be a schema, a dot and a name', model.name, _named
        );
        hint := 'Write it as SQL does, in double quotes where they are needed, and without arguments.';
        errcode := 'invalid_parameter_value';
        RETURN;
    END IF;
    function_name := format('%I.%I', _parts[1], _parts[2]);
    function_id := to_regprocedure(function_name || arguments);
    IF function_id IS NULL THEN
        problem := format('there is no function %s%s', function_name, arguments);
        hint := format('Create it; then SELECT autoembed.alter_model(%L).', model.name);
        errcode := CASE WHEN to_regproc(function_name) IS NULL THEN 'waits' ELSE 'undefined_function' END;
    ELSIF NOT EXISTS (
        SELECT FROM pg_proc AS p
        WHERE p.oid = function_id AND p.prokind = 'f' AND NOT p.proretset AND p.prorettype = ANY (_types)
    ) THEN
        IF purpose = 'rerank' THEN
            problem := format('function %s%s does not return real[] or double precision[]', function_name, arguments);
            hint := 'It is given a query and passages, and returns a score for each passage, in their order.';
        ELSE
            problem := format('function %s%s does not return vector[] or halfvec[]', function_name, arguments);
            hint := 'It is given texts, and returns a vector for each, in their order.';
        END IF;
        errcode := 'datatype_mismatch';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._embedder IS
    'The function that a model names for documents, queries or reranking, the name of the function that runs it as its '
    'owner, and its fault, if it has one.';

CREATE OR REPLACE FUNCTION autoembed._purposes(model autoembed.model)
    RETURNS text[]
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE
        WHEN model.dimensions IS NULL THEN '{rerank}'
        WHEN model.options ? 'query_function' THEN '{document,query}'
        ELSE '{document}'
    END::text[];
$sql$;
COMMENT ON FUNCTION autoembed._purposes IS 'For what a model that is an SQL function is called.';

CREATE OR REPLACE FUNCTION autoembed._embedder_version(model autoembed.model, purpose text)
    RETURNS text
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT concat(p.xmin, p.ctid) FROM pg_proc AS p WHERE p.oid = (autoembed._embedder(model, purpose)).function_id;
$sql$;
COMMENT ON FUNCTION autoembed._embedder_version IS
    'Another text whenever somebody replaces the function that a model names.';

CREATE OR REPLACE FUNCTION autoembed._build_embedders(name text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _built regprocedure;
    _embedder record;
BEGIN
    FOR _built IN
        SELECT p.oid FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace
          AND p.proname IN ('_embed_document_' || md5(name), '_embed_query_' || md5(name), '_rerank_' || md5(name))
    LOOP
        EXECUTE format('DROP FUNCTION %s', _built);
    END LOOP;
    FOR _embedder IN
        SELECT e.*, p.purpose, f.proowner, f.prorettype, n.nspname
        FROM autoembed.model AS m
        CROSS JOIN unnest(autoembed._purposes(m)) AS p(purpose)
        CROSS JOIN LATERAL autoembed._embedder(m, p.purpose) AS e
        LEFT JOIN pg_proc AS f ON f.oid = e.function_id
        LEFT JOIN pg_namespace AS n ON n.oid = f.pronamespace
        WHERE m.name = _build_embedders.name AND m.provider = 'function'
    LOOP
        IF _embedder.errcode = 'waits' THEN
            RAISE WARNING USING
                ERRCODE = 'undefined_function',
                MESSAGE = format('model "%s" cannot be used yet: %s', name, _embedder.problem),
                HINT = _embedder.hint;
        ELSIF _embedder.problem IS NOT NULL THEN
            RAISE EXCEPTION USING MESSAGE = _embedder.problem, HINT = _embedder.hint, ERRCODE = _embedder.errcode;
        ELSE
            PERFORM autoembed._create_function(
                CASE _embedder.purpose WHEN 'rerank' THEN 'reranker' ELSE 'embedder' END,
                jsonb_build_object(
                    'wrapper', _embedder.wrapper,
                    'function', _embedder.function_name,
                    'returned_type', format_type(_embedder.prorettype, NULL),
                    'search_path', format('%I, public, pg_temp', _embedder.nspname)
                ),
                pg_get_userbyid(_embedder.proowner)
            );
        END IF;
    END LOOP;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._build_embedders IS
    'Replaces the functions that run those of a model as their owners. Drops them if the model is gone.';

CREATE OR REPLACE FUNCTION autoembed._is_chosen(wrapper name, function_id oid)
    RETURNS boolean
    LANGUAGE sql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT EXISTS (
        SELECT FROM pg_proc AS w
        JOIN pg_proc AS f ON f.oid = function_id AND f.proowner = w.proowner
        WHERE w.pronamespace = 'autoembed'::regnamespace AND w.proname = wrapper AND w.prosecdef
    );
$sql$;
COMMENT ON FUNCTION autoembed._is_chosen IS
    'Whether a function still has the owner that it had when a superuser defined the model of this wrapper.';

CREATE OR REPLACE FUNCTION autoembed._call_embedder(
    model text,
    purpose text,
    texts text[],
    query text DEFAULT NULL,
    OUT vectors bytea[],
    OUT scores double precision[],
    OUT fault text
)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- The words of _context are read below.
    SET lc_messages = 'C'
AS $plpgsql$
DECLARE
    _embedder record;
    _context text;
BEGIN
    SELECT e.* INTO STRICT _embedder
    FROM autoembed._model(model, purpose = 'rerank') AS m
    CROSS JOIN LATERAL autoembed._embedder(m, purpose) AS e;
    fault := _embedder.problem;
    -- Another's function of that name would run as the owner of the one that a superuser has chosen.
    IF fault IS NULL AND NOT autoembed._is_chosen(_embedder.wrapper, _embedder.function_id) THEN
        fault := format(
            'function %s%s was not there, or had another owner, when the model was defined; '
            'SELECT autoembed.alter_model(%L) takes it as it is',
            _embedder.function_name, _embedder.arguments, model
        );
    END IF;
    IF fault IS NULL AND purpose = 'rerank' THEN
        -- One score more than passages shows that there are too many.
        EXECUTE format(
            'SELECT ARRAY(SELECT u.score::pg_catalog.float8'
            ' FROM pg_catalog.unnest(autoembed.%I($1, $2)) WITH ORDINALITY AS u(score, n) ORDER BY u.n LIMIT $3)',
            _embedder.wrapper
        )
        INTO scores
        USING query, texts, cardinality(texts) + 1;
    ELSIF fault IS NULL THEN
        -- One statement, read before the owner's code can change what its names mean; the last one, too.
        EXECUTE format(
            'SELECT ARRAY(SELECT %1$s.vector_send(u.v::%1$s.vector)'
            ' FROM pg_catalog.unnest(autoembed.%2$I($1)) WITH ORDINALITY AS u(v, n) ORDER BY u.n)',
            '@extschema:vector@', _embedder.wrapper
        )
        INTO vectors
        USING texts;
    END IF;
EXCEPTION WHEN query_canceled THEN
    GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
    -- A cancel that the function raises is an error of that function. A real one goes on.
    IF _context !~ E'^PL/pgSQL function ("([^"]|"")*"|[^"\n])* line [0-9]+ at RAISE(\n|$)' THEN
        RAISE;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'external_routine_exception', MESSAGE = SQLERRM;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._call_embedder IS
    'The vectors that a model''s function makes of texts, in binary form; or the scores that it gives passages, by how '
    'well they answer the query; or the reason why it is not called. The caller rolls this back: the code of the '
    'function''s owner may have changed the session.';
