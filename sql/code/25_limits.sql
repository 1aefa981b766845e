-- Limits on the requests to a model, and on its use in a day, for all sessions together.

CREATE OR REPLACE FUNCTION autoembed._spent_budget(name text)
    RETURNS text
    LANGUAGE sql
    STABLE
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE
        WHEN u.tokens >= m.daily_token_budget THEN
            format('its budget of %s tokens a day is used up; the next day begins at 00:00 UTC', m.daily_token_budget)
        WHEN u.tokens * m.price_per_million_tokens >= m.daily_cost_budget * 1000000 THEN
            format('its budget of %s a day is used up; the next day begins at 00:00 UTC', m.daily_cost_budget)
    END
    FROM autoembed.model AS m
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(t.tokens), 0) AS tokens
        FROM (
            SELECT d.tokens
            FROM autoembed.usage_day AS d
            WHERE d.model = m.name AND d.day = (clock_timestamp() AT TIME ZONE 'UTC')::date
            UNION ALL
            SELECT e.tokens
            FROM autoembed.usage_entry AS e
            WHERE e.model = m.name AND e.at >= date_trunc('day', clock_timestamp(), 'UTC')
        ) AS t
    ) AS u
    WHERE m.name = _spent_budget.name AND num_nonnulls(m.daily_token_budget, m.daily_cost_budget) > 0;
$sql$;
COMMENT ON FUNCTION autoembed._spent_budget IS 'Why a model may use no more today; NULL: it may.';

CREATE OR REPLACE FUNCTION autoembed._make_slots(model text)
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    INSERT INTO autoembed.slot (model, number)
    SELECT m.name, n
    FROM autoembed.model AS m
    CROSS JOIN generate_series(1, m.max_requests_in_flight) AS n
    WHERE m.name = _make_slots.model
    ON CONFLICT DO NOTHING;
$sql$;
COMMENT ON FUNCTION autoembed._make_slots IS
    'Makes the slots of a model that limits its requests in flight, where they are not there.';

CREATE OR REPLACE FUNCTION autoembed._take_slot(model text, noted boolean)
    RETURNS integer
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _slots integer := (SELECT m.max_requests_in_flight FROM autoembed.model AS m WHERE m.name = _take_slot.model);
    _number integer;
BEGIN
    IF _slots IS NULL OR current_setting('transaction_read_only')::boolean THEN
        RETURN 0;
    END IF;
    IF (SELECT count(*) FROM autoembed.slot AS s WHERE s.model = _take_slot.model) < _slots THEN
        -- After a restore or a crash. A row that is inserted for a caller would keep lanes waiting.
        IF NOT noted THEN
            RETURN 0;
        END IF;
        PERFORM autoembed._make_slots(_take_slot.model);
    END IF;
    SELECT s.number INTO _number
    FROM autoembed.slot AS s
    WHERE s.model = _take_slot.model AND s.number <= _slots
      AND (s.pid IS NULL OR NOT autoembed._lane_lives(s.pid, s.backend_start))
    LIMIT 1
    FOR UPDATE SKIP LOCKED;
    IF noted THEN
        UPDATE autoembed.slot AS s
        SET pid = a.pid, backend_start = a.backend_start
        FROM pg_stat_get_activity(pg_backend_pid()) AS a
        WHERE s.model = _take_slot.model AND s.number = _number;
    END IF;
    RETURN _number;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_slot IS
    'Takes a slot for one request in flight: noted, until _free_slots() or the end of the session, and else until the '
    'end of the transaction. 0: no slot is needed. NULL: all slots are taken.';

CREATE OR REPLACE FUNCTION autoembed._free_slots(model text, slots integer[])
    RETURNS void
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    UPDATE autoembed.slot AS s
    SET pid = NULL, backend_start = NULL
    WHERE s.model = _free_slots.model AND s.number = ANY (slots) AND s.pid = pg_backend_pid();
$sql$;
COMMENT ON FUNCTION autoembed._free_slots IS
    'Frees the slots of requests of this session that are no longer in flight.';

CREATE OR REPLACE FUNCTION autoembed._take_permit(
    model text,
    in_turn boolean,
    with_slot boolean,
    requests_seconds double precision,
    requests_saved_seconds double precision,
    tokens_seconds double precision,
    tokens_saved_seconds double precision,
    patience_seconds double precision,
    OUT wait_seconds double precision,
    OUT slot integer,
    OUT spent text,
    OUT rest_seconds double precision
)
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _now timestamptz;
    _requests_until timestamptz;
    _tokens_until timestamptz;
BEGIN
    PERFORM autoembed._gate();
    spent := autoembed._spent_budget(_take_permit.model);
    IF spent IS NOT NULL THEN
        rest_seconds := extract(
            epoch FROM date_trunc('day', clock_timestamp(), 'UTC') + interval '1 day' - clock_timestamp()
        );
        RETURN;
    END IF;
    IF current_setting('transaction_read_only')::boolean THEN
        wait_seconds := 0;
        RETURN;
    END IF;
    wait_seconds := 0;
    IF num_nonnulls(requests_seconds, tokens_seconds) > 0 THEN
        IF in_turn THEN
            -- A lane commits at once. A caller's transaction may last: it takes no turn, and what it takes is seen
            -- late.
            PERFORM FROM autoembed.model AS m WHERE m.name = _take_permit.model FOR NO KEY UPDATE;
        END IF;
        _now := clock_timestamp();
        _requests_until := (
            SELECT max(p.requests_until) FROM autoembed.permit AS p WHERE p.model = _take_permit.model
        );
        _tokens_until := (
            SELECT max(p.tokens_until) FROM autoembed.permit AS p WHERE p.model = _take_permit.model
        );
        -- NULL where there is no limit; greatest() passes over a NULL.
        _requests_until := greatest(_requests_until, _now - make_interval(secs => requests_saved_seconds))
            + make_interval(secs => requests_seconds);
        _tokens_until := greatest(_tokens_until, _now - make_interval(secs => tokens_saved_seconds))
            + make_interval(secs => tokens_seconds);
        wait_seconds := extract(epoch FROM greatest(_now, _requests_until, _tokens_until) - _now);
        IF wait_seconds > patience_seconds THEN
            RETURN;
        END IF;
    END IF;
    IF with_slot AND in_turn THEN
        slot := autoembed._take_slot(_take_permit.model, true);
        IF slot IS NULL THEN
            wait_seconds := NULL;
            RETURN;
        END IF;
        slot := nullif(slot, 0);
    ELSIF with_slot AND (
        SELECT count(*)
        FROM autoembed.slot AS s
        WHERE s.model = _take_permit.model AND autoembed._lane_lives(s.pid, s.backend_start)
    ) >= (SELECT m.max_requests_in_flight FROM autoembed.model AS m WHERE m.name = _take_permit.model) THEN
        -- A caller's transaction may last, so it holds no slot. It waits until one is free.
        wait_seconds := NULL;
        RETURN;
    END IF;
    IF _now IS NOT NULL THEN
        INSERT INTO autoembed.permit (model, at, requests_until, tokens_until)
        VALUES (_take_permit.model, _now, _requests_until, _tokens_until);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._take_permit IS
    'A permit for one request: the seconds to wait, and the slot, where with_slot asks for one and the model limits '
    'the requests in flight. Both NULL: all slots are taken, or the budget is spent. More seconds than the patience: '
    'nothing is taken. The charges are in seconds of each allowance, with the seconds that may have been saved up.';

CREATE OR REPLACE FUNCTION autoembed._learn(model text, limits jsonb)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    -- embed() works in these too.
    IF current_setting('transaction_read_only')::boolean THEN
        RETURN false;
    END IF;
    INSERT INTO autoembed.model_limit (model, name, value)
    SELECT m.name, l.key, l.value::integer
    -- Unless it was dropped meanwhile.
    FROM autoembed.model AS m
    CROSS JOIN jsonb_each_text(_learn.limits) AS l
    WHERE m.name = _learn.model
      -- A shorter text was refused before.
      AND (l.key = 'tokens_per_input'
           AND (autoembed._learnt(m.name) ->> l.key)::integer <= l.value::integer) IS NOT TRUE;
    RETURN FOUND;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._learn IS
    'Notes limits of a model by name, as autoembed.model_limit has them. Returns whether any of them is new.';

CREATE OR REPLACE FUNCTION autoembed._forget_permits()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
BEGIN
    IF (SELECT min(p.at) FROM autoembed.permit AS p) < clock_timestamp() - interval '10 minutes' THEN
        DELETE FROM autoembed.permit AS p
        WHERE greatest(p.at, p.requests_until, p.tokens_until) < clock_timestamp() - interval '5 minutes';
    END IF;
    DELETE FROM autoembed.model_limit AS l
    WHERE EXISTS (SELECT FROM autoembed.model_limit AS n WHERE n.model = l.model AND n.name = l.name AND n.at > l.at);
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._forget_permits IS
    'Forgets permits of some minutes ago, and limits that have changed since.';
