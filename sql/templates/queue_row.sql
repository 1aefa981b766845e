INSERT INTO autoembed._job (due_at, message)
        SELECT clock_timestamp(),
               concat('{"pipeline": {{id}}, "keys": [',
                      CASE TG_OP WHEN 'INSERT' THEN {{new_key}} ELSE {{old_key}} END, ']}')::jsonb
        WHERE CASE TG_OP WHEN 'INSERT' THEN {{has_new_key}} ELSE {{has_old_key}} END;
