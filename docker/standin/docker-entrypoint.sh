#!/usr/bin/env bash
# Entrypoint of the stand-in base: the documented behaviour of the official postgres image, in brief.
set -Eeo pipefail

fail() {
    echo "$0: $*" >&2
    exit 1
}

# Sets the variable $1 from the file that $1_FILE names, else to the default $2.
from_file() {
    local file_name=$1_FILE
    if [[ -n ${!1:-} && -n ${!file_name:-} ]]; then fail "set $1 or $file_name, not both."; fi
    if [[ -n ${!file_name:-} ]]; then
        export "$1=$(< "${!file_name}")"
    else
        export "$1=${!1:-${2:-}}"
    fi
    unset "$file_name"
}

# The images of PostgreSQL 18 and later keep their data in another place. A volume in the old one would not hold them.
check_volume() {
    if [[ $PGDATA != /var/lib/postgresql/data* ]] && grep -q ' /var/lib/postgresql/data ' /proc/self/mountinfo; then
        fail "a volume is mounted at /var/lib/postgresql/data, but PostgreSQL $PG_MAJOR has its at /var/lib/postgresql."
    fi
}

make_directories() {
    mkdir -p "$PGDATA" /var/run/postgresql || true
    # A user who does not own the directory may still be able to use it.
    chmod 700 "$PGDATA" || true
    if [[ $(id -u) == 0 ]]; then
        find "$PGDATA" /var/run/postgresql \! -user postgres -exec chown postgres {} +
    fi
}

init_cluster() {
    [[ -n $POSTGRES_PASSWORD || $POSTGRES_HOST_AUTH_METHOD == trust ]] ||
        fail "a new database needs a password: set POSTGRES_PASSWORD (or POSTGRES_HOST_AUTH_METHOD=trust)."
    local initdb_arguments names named=()
    eval "initdb_arguments=($POSTGRES_INITDB_ARGS)"
    # initdb refuses a user without a name.
    if ! getent passwd "$(id -u)" > /dev/null; then
        names=$(mktemp)
        echo "postgres:x:$(id -u):$(id -g)::$PGDATA:/bin/false" > "$names"
        named=(env LD_PRELOAD=libnss_wrapper.so NSS_WRAPPER_PASSWD="$names" NSS_WRAPPER_GROUP=/etc/group)
    fi
    "${named[@]}" initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") "${initdb_arguments[@]}"
    echo "host all all all ${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >> "$PGDATA/pg_hba.conf"
}

# Runs the user's scripts on a server that nobody can reach by TCP.
init_database() {
    export PGPASSWORD=$POSTGRES_PASSWORD
    pg_ctl --silent --wait -o "$(printf '%q ' "$@" -c listen_addresses='' -p "${PGPORT:-5432}")" start
    psql=(env PGHOST= PGUSER="$POSTGRES_USER" PGDATABASE="$POSTGRES_DB" psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc)
    if [[ $POSTGRES_DB != postgres ]]; then
        PGDATABASE=postgres PGHOST='' PGUSER=$POSTGRES_USER \
            psql -v ON_ERROR_STOP=1 --no-psqlrc --quiet --set database="$POSTGRES_DB" <<< 'CREATE DATABASE :"database";'
    fi
    local file
    for file in /docker-entrypoint-initdb.d/*; do
        echo "$0: $file"
        # shellcheck disable=SC1090 # The file is the user's.
        case $file in
            *.sh) if [[ -x $file ]]; then "$file"; else source "$file"; fi ;;
            *.sql) "${psql[@]}" --file="$file" ;;
            *.sql.gz) gunzip --stdout "$file" | "${psql[@]}" ;;
            *) echo "$0: ignored" ;;
        esac
    done
    pg_ctl --silent --wait --mode=fast stop
    unset PGPASSWORD
}

if [[ ${1:-} == -* ]]; then set -- postgres "$@"; fi
if [[ ${1:-} != postgres || " $* " =~ \ (--help|--version|--describe-config|-V|-\?)\  ]]; then exec "$@"; fi

from_file POSTGRES_PASSWORD
from_file POSTGRES_USER postgres
from_file POSTGRES_DB "$POSTGRES_USER"
from_file POSTGRES_INITDB_ARGS
: "${POSTGRES_HOST_AUTH_METHOD:=}"
check_volume
make_directories
if [[ $(id -u) == 0 ]]; then exec gosu postgres "$0" "$@"; fi
if [[ ! -s $PGDATA/PG_VERSION ]]; then
    init_cluster
    init_database "${@:2}"
fi
exec "$@"
