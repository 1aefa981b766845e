-- Records that are made later are those of other rows: nobody writes a row while the table is truncated.
INSERT INTO autoembed._job (due_at, enqueued_at, message)
        VALUES (pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp(), '{"pipeline": {{id}}, "truncated": true}');
