INSERT INTO autoembed._job (due_at, message)
        VALUES (clock_timestamp(), '{"pipeline": {{id}}, "truncated": true}');
