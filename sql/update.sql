-- Begins each update. Functions and views that the update drops and creates again lose their grants: _updated() gives them
-- back, after the script, since what the script grants would count as the extension's own.
LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE;
-- Lanes of the version before run with its Python. They end, and the next ones run with the new.
UPDATE autoembed.lane SET stop = true;

SELECT set_config('autoembed.grants_before_update', coalesce(jsonb_agg(jsonb_build_object(
    'object', o.name, 'routine', o.is_routine, 'privilege', a.privilege_type, 'grantee', a.grantee::bigint
)), '[]')::text, true)
FROM (
    SELECT p.proname::text, true, p.proowner, p.proacl FROM pg_proc AS p WHERE p.pronamespace = 'autoembed'::regnamespace
    UNION ALL
    SELECT c.relname::text, false, c.relowner, c.relacl
    FROM pg_class AS c
    WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v')
) AS o(name, is_routine, owner, acl)
CROSS JOIN LATERAL aclexplode(o.acl) AS a
WHERE a.grantee NOT IN (0, o.owner);
