DO $$
BEGIN
    IF getdatabaseencoding() <> 'UTF8' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = format('database "%s" has the encoding %s, and autoembed needs UTF8',
                             current_database(), getdatabaseencoding()),
            HINT = 'Make another: CREATE DATABASE app TEMPLATE template0 ENCODING ''UTF8'' LOCALE ''C.UTF-8'';';
    END IF;
    IF to_regnamespace('autoembed') IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_schema',
            MESSAGE = 'the schema autoembed exists already, and autoembed makes its own',
            HINT = 'Drop it if it is empty: DROP SCHEMA autoembed; or give it another name: '
                'ALTER SCHEMA autoembed RENAME TO …;';
    END IF;
END;
$$;

CREATE SCHEMA autoembed;
COMMENT ON SCHEMA autoembed IS
    'Keeps embeddings in step with their rows. Names that begin with _ are private.';
