INSERT INTO autoembed._job (due_at, message)
        VALUES (pg_catalog.clock_timestamp(), '{"pipeline": {{id}}, "truncated": true}');
