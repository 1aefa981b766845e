-- 90_privileges.sql: nothing is for PUBLIC. Last, so that nothing escapes it.

REVOKE ALL ON SCHEMA autoembed FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA autoembed FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA autoembed FROM PUBLIC;
