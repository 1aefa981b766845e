-- Models: their facts, and who may use them.

CREATE OR REPLACE FUNCTION autoembed._default_model()
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce((SELECT s.value FROM autoembed.setting AS s WHERE s.name = 'default_model'), 'all-MiniLM-L6-v2');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._default_model IS 'The model of pipelines and embed() calls that name none.';

CREATE OR REPLACE FUNCTION autoembed._model(name text, reranks boolean DEFAULT false)
    RETURNS autoembed.model
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name text := coalesce(_model.name, autoembed._default_model());
    _found autoembed.model;
BEGIN
    SELECT m.* INTO _found FROM autoembed.model AS m WHERE m.name = _name;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('%smodel "%s" does not exist', CASE WHEN reranks THEN 'rerank ' END, _name),
            DETAIL = (
                SELECT coalesce(
                    format('The %smodels are: ', CASE WHEN reranks THEN 'rerank ' END)
                        || string_agg(m.name, ', ' ORDER BY m.name) || '.',
                    'There is none yet.'
                )
                FROM autoembed.model AS m
                WHERE (m.dimensions IS NULL) = coalesce(reranks, m.dimensions IS NULL)
            ),
            HINT = CASE
                WHEN reranks THEN 'Create it with autoembed.create_rerank_model().'
                ELSE 'Create it with autoembed.create_model().'
            END;
    ELSIF (_found.dimensions IS NULL) <> reranks THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = CASE
                WHEN reranks THEN format('model "%s" makes embeddings, and reranks nothing', _name)
                ELSE format('model "%s" reranks, and makes no embeddings', _name)
            END,
            HINT = CASE
                WHEN reranks THEN 'Name a model that autoembed.create_rerank_model() has made.'
                ELSE 'Name a model that autoembed.create_model() has made.'
            END;
    END IF;
    RETURN _found;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model IS
    'The model of that name, NULL for the default one; an error if there is none. reranks: a rerank model is wanted, '
    'and not one that makes embeddings; NULL: either.';

CREATE OR REPLACE FUNCTION autoembed._dimensions(model text)
    RETURNS integer
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT (autoembed._model(model)).dimensions;
$sql$;
COMMENT ON FUNCTION autoembed._dimensions IS 'The length of a model''s vectors.';

CREATE OR REPLACE FUNCTION autoembed._model_identity(model autoembed.model)
    RETURNS text
    LANGUAGE sql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT (jsonb_build_array(
        model.provider, model.model_id, model.dimensions, coalesce(model.options ->> 'document_prefix', '')
    ) || CASE
        -- Models without such fields keep the identity that is in their digests.
        WHEN model.options ? 'document_body' THEN jsonb_build_array(model.options ->> 'document_body')
        ELSE '[]'
    END)::text;
$sql$;
COMMENT ON FUNCTION autoembed._model_identity IS
    'The properties that make the vectors of two models interchangeable, as a JSON array: provider, model_id, '
    'dimensions, document_prefix, and document_body if it has any.';

CREATE OR REPLACE FUNCTION autoembed._http_hosts()
    RETURNS text[]
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce(
        (SELECT string_to_array(s.value, ' ') FROM autoembed.setting AS s WHERE s.name = 'http_hosts'), '{}'
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._http_hosts IS 'The hosts that may be called without encryption; see allow_http_host().';

CREATE OR REPLACE FUNCTION autoembed._vault_key(reference text, OUT vault_key text, OUT vault_fault text)
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name text := substring(reference FROM '^vault:(.*)$');
    _view oid := to_regclass('vault.decrypted_secrets');
BEGIN
    IF _name IS NULL THEN
        RETURN;
    END IF;
    -- Without a Vault, anybody who may create schemas could make such a view, whose code would run as superuser.
    IF NOT EXISTS (
        SELECT FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner WHERE c.oid = _view AND r.rolsuper
    ) THEN
        vault_fault := 'this database has no Vault: no view vault.decrypted_secrets that belongs to a superuser';
        RETURN;
    END IF;
    EXECUTE 'SELECT s.decrypted_secret::text FROM vault.decrypted_secrets AS s WHERE s.name = $1'
    INTO vault_key USING _name;
    IF vault_key IS NULL THEN
        vault_fault := format('the vault has no secret "%s"', _name);
    END IF;
EXCEPTION WHEN OTHERS THEN
    -- Not raised: other models have work to do. Not repeated: the message may hold what was read.
    vault_key := NULL;
    vault_fault := format('the vault gives no secret "%s" (SQLSTATE %s)', _name, SQLSTATE);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._vault_key IS
    'The key that vault:NAME refers to, or why it cannot be had; nothing for other references.';

CREATE OR REPLACE FUNCTION autoembed._learnt(model text)
    RETURNS jsonb
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    -- The last of the values of one name stays.
    SELECT jsonb_object_agg(l.name, l.value ORDER BY l.at)
    FROM autoembed.model_limit AS l
    WHERE l.model = _learnt.model;
$sql$;
COMMENT ON FUNCTION autoembed._learnt IS
    'The limits of a model by name, as autoembed.model_limit has them; NULL: it never answered.';

CREATE OR REPLACE FUNCTION autoembed._model_facts(model autoembed.model)
    RETURNS jsonb
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN to_jsonb(model)
        || jsonb_build_object(
            'identity', autoembed._model_identity(model),
            'http_hosts', autoembed._http_hosts(),
            'learnt', autoembed._learnt((_model_facts.model).name)
        )
        || jsonb_build_object('vault_secrets', (
            SELECT coalesce(jsonb_object_agg(r.reference, to_jsonb(v)), '{}')
            FROM (
                SELECT (_model_facts.model).api_key AS reference
                UNION
                SELECT h.value
                FROM jsonb_each_text(CASE jsonb_typeof((_model_facts.model).options -> 'extra_headers')
                                         WHEN 'object' THEN (_model_facts.model).options -> 'extra_headers' END) AS h
            ) AS r
            CROSS JOIN LATERAL autoembed._vault_key(r.reference) AS v
            WHERE r.reference LIKE 'vault:_%'
        ));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model_facts IS
    'What the Python side needs to know of a model: its row, and what the row refers to.';

CREATE OR REPLACE FUNCTION autoembed._keep_restored_model()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    DELETE FROM autoembed.model AS m WHERE m.name = NEW.name AND m.builtin;
    RETURN NEW;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._keep_restored_model IS
    'Lets a restored dump replace the models that CREATE EXTENSION has made.';
