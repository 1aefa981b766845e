-- Each update begins with this file.

-- New objects belong to the owner of the extension, not to the superuser who runs the update.
SELECT set_config('role', pg_get_userbyid(e.extowner), true) FROM pg_extension AS e WHERE e.extname = 'autoembed';

-- A statement that waits for a lock stops all that come later. A tenant may hold one for ever.
SET LOCAL lock_timeout = '2s';
LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE;
-- Running lanes use the Python code of the version before. They end, and the next ones use the new code.
UPDATE autoembed.lane SET stop = true;

-- Functions and views that the update drops and creates again lose their grants. _updated() gives these back after the
-- script, since a grant by the script would count as the extension's own.
SELECT set_config('autoembed.grants_before_update', coalesce(jsonb_agg(jsonb_build_object(
    'object', o.name, 'routine', o.is_routine, 'privilege', a.privilege_type, 'grantee', a.grantee::bigint
)), '[]')::text, true)
FROM (
    SELECT p.proname::text, true, p.proowner, p.proacl
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace
    UNION ALL
    SELECT c.relname::text, false, c.relowner, c.relacl
    FROM pg_class AS c
    WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v')
) AS o(name, is_routine, owner, acl)
CROSS JOIN LATERAL aclexplode(o.acl) AS a
WHERE a.grantee <> o.owner;
