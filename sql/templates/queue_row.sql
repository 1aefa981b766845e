INSERT INTO autoembed._job (due_at, message)
        SELECT pg_catalog.clock_timestamp(),
               pg_catalog.concat(
                   '{"pipeline": {{id}}, "keys": [',
                   CASE WHEN TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN {{new_key}} ELSE {{old_key}} END, ']}'
               )::pg_catalog.jsonb
        WHERE CASE WHEN TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN {{has_new_key}} ELSE {{has_old_key}} END;
