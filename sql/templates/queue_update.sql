INSERT INTO autoembed._job (due_at, message)
        VALUES (pg_catalog.clock_timestamp(), pg_catalog.concat(
            '{"pipeline": {{id}}, "keys": [',
            CASE WHEN {{key_changed}} THEN pg_catalog.concat({{old_key}}, ',') END,
            {{new_key}},
            CASE WHEN {{key_changed}} THEN '], "moved": true}'
                 WHEN {{vector_changed}} THEN '], "replaced": true}'
                 ELSE ']}' END
        )::pg_catalog.jsonb);
