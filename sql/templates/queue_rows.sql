-- Most statements change few rows. To number these would cost half as much again.
        INSERT INTO autoembed._job (due_at, message)
        SELECT clock_timestamp(), concat('{"pipeline": {{id}}, "keys": [', string_agg(k.key, ','), ']}')::jsonb
        FROM (SELECT r.key FROM ({{rows}}) AS r LIMIT {{keys_per_message}} + 1) AS k
        HAVING count(*) BETWEEN 1 AND {{keys_per_message}};
        IF NOT FOUND THEN
            INSERT INTO autoembed._job (due_at, message)
            SELECT clock_timestamp(), concat('{"pipeline": {{id}}, "keys": [', string_agg(k.key, ','), ']}')::jsonb
            FROM (SELECT r.key, (row_number() OVER () - 1) / {{keys_per_message}} AS number FROM ({{rows}}) AS r) AS k
            GROUP BY k.number;
        END IF;
