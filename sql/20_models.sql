-- 20_models.sql: create, change and drop models. Where a model is and where its key lies is an administrator's business.

CREATE FUNCTION autoembed._default_model()
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
COMMENT ON FUNCTION autoembed._default_model() IS 'The model of pipelines and embed() calls that name none.';

CREATE FUNCTION autoembed._model(name text)
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
            MESSAGE = format('model "%s" does not exist', _name),
            DETAIL = (SELECT 'The models are: ' || string_agg(m.name, ', ' ORDER BY m.name) || '.' FROM autoembed.model AS m),
            HINT = 'Create it with autoembed.create_model().';
    END IF;
    RETURN _found;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model(text) IS 'The model of that name, NULL for the default one; an error if there is none.';

CREATE FUNCTION autoembed._http_hosts()
    RETURNS text[]
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN coalesce((SELECT string_to_array(s.value, ' ') FROM autoembed.setting AS s WHERE s.name = 'http_hosts'), '{}');
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._http_hosts() IS 'The hosts that may be called without encryption; see allow_http_host().';

CREATE FUNCTION autoembed._vault_key(reference text, OUT vault_key text, OUT vault_fault text)
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
    -- Where there is no Vault, anybody who may create schemas could make such a view, and its code would run as us.
    IF NOT EXISTS (SELECT FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner WHERE c.oid = _view AND r.rolsuper) THEN
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
COMMENT ON FUNCTION autoembed._vault_key(text) IS
    'The key that vault:NAME refers to, or why it cannot be had; nothing for other references.';

CREATE FUNCTION autoembed._model_identity(model autoembed.model)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    RETURN jsonb_build_array(model.provider, model.model_id, model.dimensions, coalesce(model.options ->> 'document_prefix', ''));
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model_identity(autoembed.model) IS
    'Two models with the same identity produce interchangeable vectors.';

CREATE FUNCTION autoembed._model_facts(model autoembed.model)
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
            'learnt', (SELECT to_jsonb(l) FROM autoembed.model_limit AS l WHERE l.model = (_model_facts.model).name ORDER BY l.at DESC LIMIT 1)
        )
        || (SELECT to_jsonb(v) FROM autoembed._vault_key((_model_facts.model).api_key) AS v);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._model_facts(autoembed.model) IS
    'What the Python side needs to know of a model: its row, and what the row refers to.';

CREATE FUNCTION autoembed._model_fault(name text, OUT problem text, OUT hint text, OUT errcode text, OUT waits boolean)
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.check_model(name)
$python$;
COMMENT ON FUNCTION autoembed._model_fault(text) IS
    'The fault in a model''s definition, NULL if there is none; waits: its key or folder is not there yet.';

CREATE FUNCTION autoembed._check_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _fault record;
BEGIN
    SELECT f.* INTO _fault FROM autoembed._model_fault(name) AS f;
    IF _fault.waits THEN
        RAISE WARNING USING MESSAGE = _fault.problem, HINT = _fault.hint, ERRCODE = _fault.errcode;
    ELSIF _fault.problem IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = _fault.problem, HINT = _fault.hint, ERRCODE = _fault.errcode;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_model(text) IS
    'Fails if the model cannot work as it is defined; warns if its key or folder is not there yet.';

CREATE FUNCTION autoembed._check_api_key(api_key text)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- Not left to the table's CHECK: its error would print the row, and with it a key pasted by mistake.
    IF api_key !~ '^(env|file|vault):.' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'api_key must say where the key is found, not what it is',
            HINT = 'Use env:NAME for an environment variable of the server, file:PATH for a file that it can read, or vault:NAME for a secret of the Vault extension.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_api_key(text) IS 'Fails unless it is a reference to a key.';

CREATE FUNCTION autoembed._check_budget(daily_cost_budget numeric, price_per_million_tokens numeric)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF daily_cost_budget IS NOT NULL AND price_per_million_tokens IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'daily_cost_budget needs a price',
            HINT = 'Give price_per_million_tokens too, in the same currency; or a daily_token_budget.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_budget(numeric, numeric) IS 'Fails for a budget in money without a price.';

CREATE FUNCTION autoembed.create_model(
    name text,
    provider text,
    dimensions integer,
    model_id text DEFAULT NULL,
    base_url text DEFAULT NULL,
    api_key text DEFAULT NULL,
    max_inputs_per_request integer DEFAULT NULL,
    max_tokens_per_request integer DEFAULT NULL,
    max_tokens_per_input integer DEFAULT NULL,
    requests_per_minute integer DEFAULT NULL,
    tokens_per_minute integer DEFAULT NULL,
    max_requests_in_flight integer DEFAULT NULL,
    price_per_million_tokens numeric DEFAULT NULL,
    daily_token_budget bigint DEFAULT NULL,
    daily_cost_budget numeric DEFAULT NULL,
    options jsonb DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._check_api_key(create_model.api_key);
    PERFORM autoembed._check_budget(create_model.daily_cost_budget, create_model.price_per_million_tokens);
    IF EXISTS (SELECT FROM autoembed.model AS m WHERE m.name = create_model.name) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('model "%s" already exists', create_model.name),
            HINT = 'Change it with autoembed.alter_model().';
    END IF;
    INSERT INTO autoembed.model (name, provider, model_id, dimensions, base_url, api_key,
                                 max_inputs_per_request, max_tokens_per_request, max_tokens_per_input,
                                 requests_per_minute, tokens_per_minute, max_requests_in_flight,
                                 price_per_million_tokens, daily_token_budget, daily_cost_budget, options)
    VALUES (create_model.name, create_model.provider, coalesce(create_model.model_id, create_model.name),
            create_model.dimensions, create_model.base_url, create_model.api_key, create_model.max_inputs_per_request,
            create_model.max_tokens_per_request, create_model.max_tokens_per_input,
            create_model.requests_per_minute, create_model.tokens_per_minute, create_model.max_requests_in_flight,
            create_model.price_per_million_tokens, create_model.daily_token_budget, create_model.daily_cost_budget,
            coalesce(create_model.options, '{}'));
    PERFORM autoembed._check_model(create_model.name);
    PERFORM autoembed._build_embedders(create_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_model(text, text, integer, text, text, text, integer, integer, integer, integer, integer, integer, numeric, bigint, numeric, jsonb) IS
    'Defines a model: its provider (local, openai, azure, cohere, voyage, gemini, ollama, function, fake), the length of its vectors, what the provider calls it (default: its name), where it is, where its key is found (env:NAME, file:PATH or vault:NAME), limits below the provider''s own, requests and tokens a minute and requests in flight for all sessions together (left out: what the provider''s answers tell), its price, what it may use a day (UTC) in tokens or at that price, and options of the provider.';

CREATE FUNCTION autoembed.alter_model(
    name text,
    provider text DEFAULT NULL,
    dimensions integer DEFAULT NULL,
    model_id text DEFAULT NULL,
    base_url text DEFAULT NULL,
    api_key text DEFAULT NULL,
    max_inputs_per_request integer DEFAULT NULL,
    max_tokens_per_request integer DEFAULT NULL,
    max_tokens_per_input integer DEFAULT NULL,
    requests_per_minute integer DEFAULT NULL,
    tokens_per_minute integer DEFAULT NULL,
    max_requests_in_flight integer DEFAULT NULL,
    price_per_million_tokens numeric DEFAULT NULL,
    daily_token_budget bigint DEFAULT NULL,
    daily_cost_budget numeric DEFAULT NULL,
    options jsonb DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before autoembed.model;
BEGIN
    PERFORM autoembed._check_api_key(alter_model.api_key);
    _before := autoembed._model(alter_model.name);
    PERFORM autoembed._check_budget(coalesce(alter_model.daily_cost_budget, _before.daily_cost_budget),
                                    coalesce(alter_model.price_per_million_tokens, _before.price_per_million_tokens));
    UPDATE autoembed.model AS m
    SET provider = coalesce(alter_model.provider, m.provider),
        dimensions = coalesce(alter_model.dimensions, m.dimensions),
        model_id = coalesce(alter_model.model_id, m.model_id),
        base_url = coalesce(alter_model.base_url, m.base_url),
        api_key = coalesce(alter_model.api_key, m.api_key),
        max_inputs_per_request = coalesce(alter_model.max_inputs_per_request, m.max_inputs_per_request),
        max_tokens_per_request = coalesce(alter_model.max_tokens_per_request, m.max_tokens_per_request),
        max_tokens_per_input = coalesce(alter_model.max_tokens_per_input, m.max_tokens_per_input),
        requests_per_minute = coalesce(alter_model.requests_per_minute, m.requests_per_minute),
        tokens_per_minute = coalesce(alter_model.tokens_per_minute, m.tokens_per_minute),
        max_requests_in_flight = coalesce(alter_model.max_requests_in_flight, m.max_requests_in_flight),
        price_per_million_tokens = coalesce(alter_model.price_per_million_tokens, m.price_per_million_tokens),
        daily_token_budget = coalesce(alter_model.daily_token_budget, m.daily_token_budget),
        daily_cost_budget = coalesce(alter_model.daily_cost_budget, m.daily_cost_budget),
        options = coalesce(alter_model.options, m.options),
        builtin = false
    WHERE m.name = alter_model.name;
    -- Another address or key, perhaps, with limits of its own.
    DELETE FROM autoembed.model_limit AS l WHERE l.model = alter_model.name;
    PERFORM autoembed._check_model(alter_model.name);
    PERFORM autoembed._build_embedders(alter_model.name);
    PERFORM autoembed.resume_model(alter_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.alter_model(text, text, integer, text, text, text, integer, integer, integer, integer, integer, integer, numeric, bigint, numeric, jsonb) IS
    'Changes what is not NULL of a model, ends its rest, and forgets the limits that its provider''s answers told. Rows embedded before keep their vectors.';

CREATE FUNCTION autoembed.drop_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _used_by text;
BEGIN
    PERFORM autoembed._model(drop_model.name);
    SELECT string_agg(format('%s.%I', p.table_id, p.embedding_column), ', ' ORDER BY p.id)
    INTO _used_by
    FROM autoembed.pipeline AS p
    WHERE p.model = drop_model.name;
    IF _used_by IS NOT NULL OR autoembed._default_model() = drop_model.name THEN
        RAISE EXCEPTION USING
            ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = format('model "%s" is in use', drop_model.name),
            DETAIL = coalesce('It embeds ' || _used_by || '.', 'It is the default model.'),
            HINT = 'Give these another model first; autoembed.set_default_model() changes the default one.';
    END IF;
    DELETE FROM autoembed.model AS m WHERE m.name = drop_model.name;
    PERFORM autoembed._build_embedders(drop_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.drop_model(text) IS 'Drops a model that nothing uses.';

CREATE FUNCTION autoembed.set_default_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    INSERT INTO autoembed.setting AS s (name, value)
    VALUES ('default_model', (autoembed._model(set_default_model.name)).name)
    ON CONFLICT ON CONSTRAINT setting_pkey DO UPDATE SET value = excluded.value;
    PERFORM autoembed._check_model(set_default_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.set_default_model(text) IS
    'Makes it the model of all pipelines and embed() calls that name none.';

CREATE FUNCTION autoembed.allow_http_host(host text, allowed boolean DEFAULT true)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _host text := lower(rtrim(allow_http_host.host, '.'));
    _hosts text[];
BEGIN
    IF coalesce(_host !~ '^([[:alnum:]_.-]+|[0-9a-f]*:[0-9a-f]*:[0-9a-f:.]*)$', true) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('"%s" is not the name or address of a host', allow_http_host.host),
            HINT = 'Leave out what stands before and after it in a URL, such as http:// and the port.';
    END IF;
    -- Two of these at a time would each lose the other's host.
    LOCK TABLE autoembed.setting IN SHARE ROW EXCLUSIVE MODE;
    _hosts := array_remove(autoembed._http_hosts(), _host);
    IF allow_http_host.allowed THEN
        _hosts := _hosts || _host;
    END IF;
    INSERT INTO autoembed.setting AS s (name, value)
    VALUES ('http_hosts', array_to_string(_hosts, ' '))
    ON CONFLICT ON CONSTRAINT setting_pkey DO UPDATE SET value = excluded.value;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.allow_http_host(text, boolean) IS
    'Allows models whose base_url has http and this host, or forbids it again: texts and keys then travel unencrypted. This machine needs no permission.';

CREATE FUNCTION autoembed.resume_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    PERFORM autoembed._model(resume_model.name);
    DELETE FROM autoembed.model_rest AS r WHERE r.model = resume_model.name;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resume_model(text) IS 'Ends a model''s rest: the next pass calls its provider again.';

CREATE FUNCTION autoembed._rest_model(name text, seconds double precision, needs_attention boolean, reason text)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _is_new boolean;
BEGIN
    INSERT INTO autoembed.model_rest AS r (model, until, failures, needs_attention, reason)
    VALUES (_rest_model.name, clock_timestamp() + make_interval(secs => seconds), 1,
            _rest_model.needs_attention, _rest_model.reason)
    ON CONFLICT (model) DO UPDATE
    SET until = greatest(r.until, excluded.until),
        -- Requests side by side fail together: one failed try.
        failures = r.failures + (r.until <= clock_timestamp())::integer,
        needs_attention = excluded.needs_attention,
        reason = excluded.reason
    -- An update leaves a mark there.
    RETURNING r.xmax = 0 INTO _is_new;
    RETURN _is_new;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._rest_model(text, double precision, boolean, text) IS
    'Keeps all lanes from calling a model''s provider for so many seconds; whether its trouble is new.';
