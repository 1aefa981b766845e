-- functions_rows.sql: every built-in function that has a description; those that share name and description are one.
INSERT INTO functions (name, arguments, description)
SELECT DISTINCT ON (p.proname, d.description)
    p.proname, pg_get_function_identity_arguments(p.oid), d.description
FROM pg_proc AS p
JOIN pg_description AS d ON d.objoid = p.oid AND d.classoid = 'pg_proc'::regclass
WHERE p.pronamespace = 'pg_catalog'::regnamespace
ORDER BY p.proname, d.description, p.oid;
