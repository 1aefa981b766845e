-- A cancel that an owner's code raises is an error of that code. A real one goes on.
GET STACKED DIAGNOSTICS _context = PG_EXCEPTION_CONTEXT;
            IF SQLSTATE = '57014' AND _context OPERATOR(pg_catalog.!~)
                E'^PL/pgSQL function ("([^"]|"")*"|[^"\n])* line [0-9]+ at RAISE(\n|$)'
            THEN
                RAISE;
            END IF;
