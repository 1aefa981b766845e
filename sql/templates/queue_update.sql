INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), concat(
            '{"pipeline": {{id}}, "keys": [',
            CASE WHEN {{key_changed}} THEN concat({{old_key}}, ',') END,
            {{new_key}},
            CASE WHEN {{key_changed}} THEN '], "moved": true}'
                 WHEN {{vector_changed}} THEN '], "replaced": true}'
                 ELSE ']}' END
        )::jsonb);
