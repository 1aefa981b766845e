-- An administrator creates, changes and drops models.

CREATE OR REPLACE FUNCTION autoembed._model_fault(
    name text,
    OUT problem text,
    OUT hint text,
    OUT errcode text,
    OUT waits boolean
)
    LANGUAGE plpython3u
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $python$
    if GD.get("autoembed") != "@BUILD@":
        plpy.execute("SELECT autoembed._load_python()")
    from autoembed import doors
    return doors.check_model(name)
$python$;
COMMENT ON FUNCTION autoembed._model_fault IS
    'The fault in a model''s definition, or NULLs if there is none. waits: the model''s key or folder does not exist '
    'yet.';

CREATE OR REPLACE FUNCTION autoembed._check_model(name text)
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
COMMENT ON FUNCTION autoembed._check_model IS
    'Fails if a model cannot work as it is defined. Warns if its key or folder does not exist yet.';

CREATE OR REPLACE FUNCTION autoembed._check_api_key(api_key text)
    RETURNS void
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- The error of a CHECK would print the row, and with it a key pasted by mistake.
    IF api_key !~ '^(env|file|vault):.' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'api_key must say where the key is found, not what it is',
            HINT = 'Use env:NAME for an environment variable of the server, file:PATH for a file that it can read, or '
                'vault:NAME for a secret of the Vault extension.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_api_key IS 'Fails unless api_key is a reference to a key.';

CREATE OR REPLACE FUNCTION autoembed._check_budget(daily_cost_budget numeric, price_per_million_tokens numeric)
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
            HINT = 'Give price_per_million_tokens too, in the same currency, or give daily_token_budget instead.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_budget IS 'Fails if a budget in money comes without a price.';

CREATE OR REPLACE FUNCTION autoembed._check_numbers(numbers jsonb)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _wrong record;
BEGIN
    SELECT n.key, n.value, r.range INTO _wrong
    FROM jsonb_each_text(numbers) AS n
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN n.key = 'dimensions' THEN 'from 1 to 16000'
            WHEN n.key = 'max_requests_in_flight' THEN 'from 1 to 1000'
            WHEN n.key = 'timeout_seconds' THEN 'above 0 and at most 3600'
            WHEN n.key IN ('price_per_million_tokens', 'daily_token_budget', 'daily_cost_budget') THEN '0 or more'
            ELSE 'above 0'
        END AS range
    ) AS r
    -- NaN is larger than any other number.
    WHERE NOT CASE r.range
        WHEN 'from 1 to 16000' THEN n.value::numeric BETWEEN 1 AND 16000
        WHEN 'from 1 to 1000' THEN n.value::numeric BETWEEN 1 AND 1000
        WHEN 'above 0 and at most 3600' THEN n.value::numeric > 0 AND n.value::numeric <= 3600
        WHEN '0 or more' THEN n.value::numeric >= 0 AND n.value::numeric < 'Infinity'
        ELSE n.value::numeric > 0
    END
    ORDER BY n.key
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s must be %s, not %s', _wrong.key, _wrong.range, _wrong.value),
            HINT = CASE _wrong.key
                WHEN 'dimensions' THEN 'Give the length of the vectors that the model returns.'
                ELSE 'Leave it out for the default.'
            END;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_numbers IS 'Fails if an argument of a model that is a number is out of its range.';

CREATE OR REPLACE FUNCTION autoembed._check_model_options(options jsonb)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF jsonb_typeof(options) <> 'object' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('options must be a JSON object, not %s', left(options::text, 100)),
            HINT = 'For example: options => ''{"query_prefix": "query: "}''.';
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._check_model_options IS 'Fails if the options of a model are no JSON object.';

CREATE OR REPLACE FUNCTION autoembed._add_model(
    name text,
    provider text,
    dimensions integer,
    model_id text,
    base_url text,
    api_key text,
    max_inputs_per_request integer,
    max_tokens_per_request integer,
    max_tokens_per_input integer,
    requests_per_minute integer,
    tokens_per_minute integer,
    max_requests_in_flight integer,
    price_per_million_tokens numeric,
    daily_token_budget bigint,
    daily_cost_budget numeric,
    options jsonb,
    timeout_seconds double precision
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    IF _add_model.name IS NULL OR _add_model.provider IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'a model needs a name and a provider, and one of them is NULL',
            HINT = 'For example: autoembed.create_model(''large'', ''openai'', 3072, ...).';
    END IF;
    _void := autoembed._check_api_key(_add_model.api_key);
    _void := autoembed._check_model_options(_add_model.options);
    _void := autoembed._check_numbers(jsonb_build_object(
        'dimensions', _add_model.dimensions,
        'max_inputs_per_request', _add_model.max_inputs_per_request,
        'max_tokens_per_request', _add_model.max_tokens_per_request,
        'max_tokens_per_input', _add_model.max_tokens_per_input,
        'requests_per_minute', _add_model.requests_per_minute,
        'tokens_per_minute', _add_model.tokens_per_minute,
        'max_requests_in_flight', _add_model.max_requests_in_flight,
        'price_per_million_tokens', _add_model.price_per_million_tokens,
        'daily_token_budget', _add_model.daily_token_budget,
        'daily_cost_budget', _add_model.daily_cost_budget,
        'timeout_seconds', _add_model.timeout_seconds
    ));
    _void := autoembed._check_budget(_add_model.daily_cost_budget, _add_model.price_per_million_tokens);
    IF EXISTS (SELECT FROM autoembed.model AS m WHERE m.name = _add_model.name) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('model "%s" already exists', _add_model.name),
            HINT = 'Change it with autoembed.alter_model().';
    END IF;
    INSERT INTO autoembed.model (name, provider, model_id, dimensions, base_url, api_key,
                                 max_inputs_per_request, max_tokens_per_request, max_tokens_per_input,
                                 requests_per_minute, tokens_per_minute, max_requests_in_flight,
                                 price_per_million_tokens, daily_token_budget, daily_cost_budget,
                                 options, timeout_seconds)
    VALUES (_add_model.name, _add_model.provider, coalesce(_add_model.model_id, _add_model.name),
            _add_model.dimensions, _add_model.base_url, _add_model.api_key, _add_model.max_inputs_per_request,
            _add_model.max_tokens_per_request, _add_model.max_tokens_per_input,
            _add_model.requests_per_minute, _add_model.tokens_per_minute, _add_model.max_requests_in_flight,
            _add_model.price_per_million_tokens, _add_model.daily_token_budget, _add_model.daily_cost_budget,
            coalesce(_add_model.options, '{}'), _add_model.timeout_seconds);
    _void := autoembed._check_model(_add_model.name);
    _void := autoembed._build_embedders(_add_model.name);
    PERFORM autoembed._make_slots(_add_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._add_model IS 'Does the work of create_model() and create_rerank_model().';

CREATE OR REPLACE FUNCTION autoembed.create_model(
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
    options jsonb DEFAULT NULL,
    timeout_seconds double precision DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    IF create_model.dimensions IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'null_value_not_allowed',
            MESSAGE = format('model "%s" needs dimensions, the length of its vectors', create_model.name),
            HINT = 'A rerank model, which makes no vectors, is created with autoembed.create_rerank_model().';
    END IF;
    _void := autoembed._add_model(
        create_model.name, create_model.provider, create_model.dimensions, create_model.model_id,
        create_model.base_url, create_model.api_key, create_model.max_inputs_per_request,
        create_model.max_tokens_per_request, create_model.max_tokens_per_input, create_model.requests_per_minute,
        create_model.tokens_per_minute, create_model.max_requests_in_flight, create_model.price_per_million_tokens,
        create_model.daily_token_budget, create_model.daily_cost_budget, create_model.options,
        create_model.timeout_seconds
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_model IS
    'Defines a model. provider: local, openai, azure, cohere, voyage, gemini, ollama, function or fake. dimensions: '
    'the length of its vectors. model_id: the provider''s name for it, by default its name. base_url: its address. '
    'api_key: where its key is found, env:NAME, file:PATH or vault:NAME. max_inputs_per_request, '
    'max_tokens_per_request, max_tokens_per_input: limits below the provider''s own. requests_per_minute, '
    'tokens_per_minute, max_requests_in_flight: limits for all sessions together, by default those in the provider''s '
    'answers. price_per_million_tokens: its price. daily_token_budget, daily_cost_budget: the most that it may use in '
    'a day (UTC), in tokens or at that price. options: settings of the provider. timeout_seconds: how long a request '
    'may take, an hour at most.';

CREATE OR REPLACE FUNCTION autoembed.create_rerank_model(
    name text,
    provider text,
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
    options jsonb DEFAULT NULL,
    timeout_seconds double precision DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := autoembed._add_model(
        create_rerank_model.name, create_rerank_model.provider, NULL, create_rerank_model.model_id,
        create_rerank_model.base_url, create_rerank_model.api_key, create_rerank_model.max_inputs_per_request,
        create_rerank_model.max_tokens_per_request, create_rerank_model.max_tokens_per_input,
        create_rerank_model.requests_per_minute, create_rerank_model.tokens_per_minute,
        create_rerank_model.max_requests_in_flight, create_rerank_model.price_per_million_tokens,
        create_rerank_model.daily_token_budget, create_rerank_model.daily_cost_budget, create_rerank_model.options,
        create_rerank_model.timeout_seconds
    );
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.create_rerank_model IS
    'Defines a model that tells how well passages answer a query, for the argument rerank_model of search(). provider: '
    'cohere, voyage, jina (and servers of the same protocol), tei or function, for which model_id is the function '
    '(query text, passages text[]) that returns a score for each passage. max_inputs_per_request: how many of the best '
    'rows it is given, 32 by default. max_tokens_per_input: the tokens of a passage, 500 by default. timeout_seconds: '
    'how long a search waits for it, 2 by default. The other arguments are those of create_model().';

CREATE OR REPLACE FUNCTION autoembed.alter_model(
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
    options jsonb DEFAULT NULL,
    timeout_seconds double precision DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before autoembed.model;
    _void text;
BEGIN
    _void := autoembed._check_api_key(alter_model.api_key);
    _void := autoembed._check_model_options(alter_model.options);
    _before := autoembed._model(coalesce(alter_model.name, ''), NULL);
    IF _before.dimensions IS NULL AND alter_model.dimensions IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'wrong_object_type',
            MESSAGE = format('model "%s" reranks, and has no dimensions', alter_model.name),
            HINT = 'Leave dimensions out, or create another model with autoembed.create_model().';
    END IF;
    _void := autoembed._check_numbers(jsonb_build_object(
        'dimensions', alter_model.dimensions,
        'max_inputs_per_request', alter_model.max_inputs_per_request,
        'max_tokens_per_request', alter_model.max_tokens_per_request,
        'max_tokens_per_input', alter_model.max_tokens_per_input,
        'requests_per_minute', alter_model.requests_per_minute,
        'tokens_per_minute', alter_model.tokens_per_minute,
        'max_requests_in_flight', alter_model.max_requests_in_flight,
        'price_per_million_tokens', alter_model.price_per_million_tokens,
        'daily_token_budget', alter_model.daily_token_budget,
        'daily_cost_budget', alter_model.daily_cost_budget,
        'timeout_seconds', alter_model.timeout_seconds
    ));
    _void := autoembed._check_budget(coalesce(alter_model.daily_cost_budget, _before.daily_cost_budget),
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
        timeout_seconds = coalesce(alter_model.timeout_seconds, m.timeout_seconds),
        builtin = false
    WHERE m.name = alter_model.name;
    -- Another address or key may have other limits.
    DELETE FROM autoembed.model_limit AS l WHERE l.model = alter_model.name;
    _void := autoembed._check_model(alter_model.name);
    _void := autoembed._build_embedders(alter_model.name);
    PERFORM autoembed._make_slots(alter_model.name);
    PERFORM autoembed.resume_model(alter_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines(model => alter_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.alter_model IS
    'Changes a model by the arguments that are not NULL, ends its rest, and forgets the limits learned from its '
    'provider''s answers. Rows embedded before keep their vectors.';

CREATE OR REPLACE FUNCTION autoembed.drop_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- The transaction of a tenant may stay open, or be prepared for ever.
    SET lock_timeout = '5s'
AS $plpgsql$
DECLARE
    _used_by text;
    _void text;
BEGIN
    _void := (autoembed._model(coalesce(drop_model.name, ''), NULL)).name;
    -- A table that is being given this model holds a lock of it until its transaction ends.
    PERFORM FROM autoembed.model AS m WHERE m.name = drop_model.name FOR UPDATE;
    SELECT string_agg(format('%s.%I', p.table_id, p.embedding_column), ', ' ORDER BY p.id)
    INTO _used_by
    FROM autoembed.pipeline AS p
    WHERE p.model = drop_model.name;
    IF _used_by IS NOT NULL OR autoembed._default_model() = drop_model.name THEN
        RAISE EXCEPTION USING
            ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = format('model "%s" is in use', drop_model.name),
            DETAIL = coalesce('It embeds ' || _used_by || '.', 'It is the default model.'),
            HINT = 'First give its tables another model with autoembed.alter_pipeline(), and, if it is the default '
                'model, choose another one with autoembed.set_default_model().';
    END IF;
    DELETE FROM autoembed.model AS m WHERE m.name = drop_model.name;
    _void := autoembed._build_embedders(drop_model.name);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.drop_model IS 'Drops a model that nothing uses.';

CREATE OR REPLACE FUNCTION autoembed.set_default_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _name CONSTANT text := (autoembed._model(coalesce(set_default_model.name, ''))).name;
    _void text;
BEGIN
    INSERT INTO autoembed.setting AS s (name, value)
    VALUES ('default_model', _name)
    ON CONFLICT ON CONSTRAINT setting_pkey DO UPDATE SET value = excluded.value;
    _void := autoembed._check_model(set_default_model.name);
    PERFORM autoembed._warn_of_blocked_pipelines();
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.set_default_model IS
    'Makes a model the default: all pipelines and embed() calls that name no model use it.';

CREATE OR REPLACE FUNCTION autoembed.allow_http_host(host text, allowed boolean DEFAULT true)
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
            HINT = 'Give the host alone, without http://, port and path.';
    END IF;
    -- Two calls at a time would each lose the other's host.
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
COMMENT ON FUNCTION autoembed.allow_http_host IS
    'Allows models whose base_url has http and this host, or forbids them again. Texts and keys then travel '
    'unencrypted. This machine needs no permission.';

CREATE OR REPLACE FUNCTION autoembed.resume_model(name text)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _void text;
BEGIN
    _void := (autoembed._model(coalesce(resume_model.name, ''), NULL)).name;
    DELETE FROM autoembed.model_rest AS r WHERE r.model = resume_model.name;
    IF FOUND THEN
        -- It ends what the warning of the outage began. Of several lanes, one finds the rest.
        RAISE LOG 'model "%" is in use again', name;
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed.resume_model IS 'Ends a model''s rest. The next pass calls its provider again.';

CREATE OR REPLACE FUNCTION autoembed._rest_model(
    name text,
    seconds double precision,
    needs_attention boolean,
    reason text,
    summary text
)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _is_new boolean;
BEGIN
    -- The model may have been dropped since.
    INSERT INTO autoembed.model_rest AS r (model, until, failures, needs_attention, reason, summary)
    SELECT m.name, clock_timestamp() + make_interval(secs => seconds), 1, _rest_model.needs_attention,
           _rest_model.reason, _rest_model.summary
    FROM autoembed.model AS m
    WHERE m.name = _rest_model.name
    ON CONFLICT (model) DO UPDATE
    SET until = greatest(r.until, excluded.until),
        -- Concurrent requests fail together and count once.
        failures = r.failures + (r.until <= clock_timestamp())::integer,
        needs_attention = excluded.needs_attention,
        reason = excluded.reason,
        summary = excluded.summary
    -- xmax is not 0 in a row that was updated.
    RETURNING r.xmax = 0 INTO _is_new;
    RETURN coalesce(_is_new, false);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._rest_model IS
    'Keeps all lanes from calling a model''s provider for so many seconds. Returns whether the trouble is new.';
