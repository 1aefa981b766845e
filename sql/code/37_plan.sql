-- A pipeline whose texts could not be read stops, and goes on once they can.

CREATE OR REPLACE FUNCTION autoembed._note_plan(pipeline_id integer, problem text)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _before text;
BEGIN
    SELECT p.plan_problem INTO _before
    FROM autoembed.pipeline AS p
    WHERE p.id = _note_plan.pipeline_id AND (p.plan_problem IS NOT NULL OR problem IS NOT NULL)
    -- A tenant may have locked the row. Another look comes.
    FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE autoembed.pipeline AS p
    SET plan_problem = left(problem, 1000), planned_at = clock_timestamp(),
        -- The same problem is told again when it comes again.
        warned_of = CASE WHEN problem IS NOT NULL THEN p.warned_of END
    WHERE p.id = _note_plan.pipeline_id;
    IF problem IS NULL THEN
        -- Rows may fulfil the condition by now that did not, and the other way round.
        PERFORM autoembed._backfill(ARRAY[_note_plan.pipeline_id]);
    END IF;
    RETURN left(problem, 1000) IS DISTINCT FROM _before;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._note_plan IS
    'Notes why a pipeline''s texts cannot be read, which stops it; NULL: they can, and its rows are scanned if they '
    'could not. Returns whether that is new.';

CREATE OR REPLACE FUNCTION autoembed._rows_to_try(
    pipeline_id integer,
    OUT is_stopped boolean,
    OUT cuts boolean,
    OUT keys text[]
)
    LANGUAGE sql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT p.plan_problem IS NOT NULL, p.chunk_function IS NOT NULL, ARRAY(
        (SELECT k.key
         FROM (
             SELECT e.key FROM autoembed.embedded AS e
             WHERE e.pipeline_id = p.id AND left(e.key, 1) = '['
             LIMIT 200
         ) AS k
         ORDER BY random()
         LIMIT 10)
        UNION ALL
        (SELECT k.key::text
         FROM (
             SELECT q.keys FROM autoembed._job AS q
             WHERE q.pipeline = p.id::text
             ORDER BY q.due_at DESC
             LIMIT 10
         ) AS m
         CROSS JOIN LATERAL jsonb_array_elements(m.keys) AS k(key)
         LIMIT 10)
    )
    FROM autoembed.pipeline AS p
    WHERE p.id = _rows_to_try.pipeline_id;
$sql$;
COMMENT ON FUNCTION autoembed._rows_to_try IS
    'Some rows of a pipeline that tell whether its texts can be read: those that had a text, and those that wait. '
    'is_stopped: the texts could not be read. cuts: its owner''s function cuts them.';

CREATE OR REPLACE FUNCTION autoembed._plan_again(pipeline_id integer, max_seconds double precision)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _plan record;
BEGIN
    SELECT p.* INTO _plan FROM autoembed._plan(pipeline_id, max_seconds) AS p;
    -- A lock, a cancel, or code that takes too long tells nothing.
    IF _plan.errcode IS NULL OR _plan.problem IS NOT NULL AND _plan.errcode <> '57014' THEN
        PERFORM autoembed._note_plan(pipeline_id, _plan.problem);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._plan_again IS
    'Stops a pipeline whose texts PostgreSQL cannot plan to read, and has one that is stopped go on once its texts can '
    'be read.';

CREATE OR REPLACE FUNCTION autoembed._plan_stopped()
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $plpgsql$
DECLARE
    _id integer;
BEGIN
    -- One at a time, and briefly: the code of its owner holds up the lane.
    UPDATE autoembed.pipeline AS p
    SET planned_at = clock_timestamp()
    WHERE p.id = (
        SELECT q.id FROM autoembed.pipeline AS q
        WHERE q.plan_problem IS NOT NULL AND q.planned_at < clock_timestamp() - interval '10 seconds'
        ORDER BY q.planned_at
        LIMIT 1
        FOR NO KEY UPDATE SKIP LOCKED
    )
    RETURNING p.id INTO _id;
    IF FOUND THEN
        -- Code that is slow has its time now and then.
        PERFORM autoembed._plan_again(_id, CASE WHEN random() < 0.05 THEN 1 ELSE 0.1 END);
    END IF;
END;
$plpgsql$;
COMMENT ON FUNCTION autoembed._plan_stopped IS
    'Looks whether a pipeline whose texts could not be read can go on: a change of rights, a cast or an operator tells '
    'no trigger.';
