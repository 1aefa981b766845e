#!/usr/bin/env bash
# First start of the image: creates autoembed and pg_cron in POSTGRES_DB, and starts AUTOEMBED_LANES lanes (1).
# In a subshell, because the entrypoint may run this file or source it.
(
    set -euo pipefail
    lanes=${AUTOEMBED_LANES:-1}
    if [[ ! $lanes =~ ^[0-9]+$ ]]; then
        echo "AUTOEMBED_LANES is '$lanes' but must be a whole number: correct it, and start again with an empty volume." >&2
        exit 1
    fi

    # By environment, because psql would read a database name with '=' in it as a connection string.
    export PGHOST='' PGUSER=$POSTGRES_USER PGDATABASE=$POSTGRES_DB
    run_sql() { psql --no-psqlrc --no-password --quiet --set ON_ERROR_STOP=1 "$@"; }

    # pg_cron reads the name of its database at server start only.
    run_sql --set database="$POSTGRES_DB" <<< "ALTER SYSTEM SET cron.database_name = :'database';"
    pg_ctl --silent --wait restart

    run_sql <<< 'CREATE EXTENSION pg_cron; CREATE EXTENSION autoembed CASCADE;'
    if ((10#$lanes)); then
        run_sql --set lanes="$lanes" --output=/dev/null <<< 'SELECT autoembed.schedule(lanes => :lanes);'
    fi
)
