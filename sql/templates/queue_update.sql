INSERT INTO autoembed._job (due_at, message)
        VALUES (pg_catalog.clock_timestamp(), pg_catalog.concat(
            '{"pipeline": {{id}}, "keys": [',
            pg_catalog.concat_ws(
                ',', CASE WHEN {{key_changed}} AND {{has_old_key}} THEN {{old_key}} END,
                CASE WHEN {{has_new_key}} THEN {{new_key}} END
            ),
            CASE WHEN {{key_changed}} THEN '], "moved": true}'
                 -- A trigger changes the text where a lane writes a vector, and the lane would write for ever.
                 WHEN {{is_echo}} THEN '], "echo": true}'
                 WHEN {{vector_changed}} THEN '], "replaced": true}'
                 ELSE ']}' END
        )::pg_catalog.jsonb);
