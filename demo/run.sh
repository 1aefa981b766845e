#!/usr/bin/env bash
# Starts the image as the container autoembed-demo, and has it embed and search real text.
set -euo pipefail
cd "$(dirname "$0")"

container=autoembed-demo
password=demo

bold='' cyan='' green='' reset=''
if [[ -t 1 ]]; then bold=$'\e[1m' cyan=$'\e[36m' green=$'\e[32m' reset=$'\e[0m'; fi

headline() { printf '\n%s%s%s\n' "$bold" "$*" "$reset"; }
show() { printf '\n%s%s%s\n\n' "$cyan" "$*" "$reset"; }

sql() {
    docker exec --interactive "$container" \
        psql --username=postgres --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --pset=null=NULL --pset=footer=off \
        --pset=format=wrapped --pset=columns=80 "$@"
}

# Shows the SQL of a file without its comments, and runs it; what it returns is of no interest.
run_file() {
    show "$(grep -v '^--' "$1")"
    sql --output=/dev/null < "$1"
}
# Shows a statement, and runs it.
run() {
    show "$1"
    sql <<< "$1"
}

# One sentence with the reason: what autoembed says, else the end of the server's log.
fail() {
    local reason
    reason=$(sql --no-align --tuples-only 2> /dev/null <<< "
        SELECT reason FROM autoembed.failed UNION ALL SELECT reason FROM autoembed.model_rest LIMIT 1;") || reason=''
    echo "$1: ${reason:-$(docker logs --tail 3 "$container" 2>&1)}" >&2
    exit 1
}

start() {
    local publish=127.0.0.1:5432:5432 tenths
    docker rm --force --volumes "$container" > /dev/null 2>&1 || true
    # Where something answers on 5432 already, Docker chooses a free port.
    if (: < /dev/tcp/127.0.0.1/5432) 2> /dev/null; then publish=127.0.0.1::5432; fi
    # The same as in compose.yaml: Docker's 64 MB of shared memory are too few for a parallel index build.
    docker run --detach --pull=never --name "$container" --env POSTGRES_PASSWORD="$password" --publish "$publish" \
        --shm-size=256m autoembed > /dev/null
    for ((tenths = 0; tenths < 1200; tenths++)); do
        # During its first start the server listens on the socket only.
        if docker exec "$container" pg_isready --host=127.0.0.1 --username=postgres > /dev/null 2>&1; then return; fi
        if [[ $(docker inspect --format '{{.State.Running}}' "$container") != true ]]; then break; fi
        sleep 0.1
    done
    fail "The server did not start"
}

# The state of a bulk load as a bar: embedded, rows, milliseconds.
show_progress() {
    local width=25 filled rate left='' full rest
    filled=$((width * $1 / $2))
    rate=$((1000 * $1 / ($3 + 1)))
    if ((rate)); then left="$((($2 - $1) / rate)) s left"; fi
    printf -v full '%*s' "$filled" ''
    printf -v rest '%*s' "$((width - filled))" ''
    printf '%s%s%s%s %5d / %d rows %4d rows/s %s\n' \
        "$green" "${full// /#}" "$reset" "${rest// /.}" "$1" "$2" "$rate" "$left"
}

# Runs the SQL of stdin, then polls the table until all its rows, counted by a subquery, have embeddings; sets rows and
# milliseconds.
embed() {
    local table=$1 embedded_rows=$2 interval_seconds=$3 with_bar=${4:-} line embedded=0 tenth=-1
    rows=0 milliseconds=0
    while IFS= read -r line; do
        if [[ $line != @* ]]; then
            # \watch ends with a blank line, which would break the bar.
            if [[ -n $line ]]; then echo "$line"; fi
            continue
        fi
        read -r _ embedded rows milliseconds <<< "$line"
        if [[ -z $with_bar ]]; then continue; fi
        if [[ -t 1 ]]; then
            printf '\r%s\e[K' "$(show_progress "$embedded" "$rows" "$milliseconds")"
        elif ((10 * embedded / rows > tenth)); then
            tenth=$((10 * embedded / rows))
            show_progress "$embedded" "$rows" "$milliseconds"
        fi
    done < <(cat - progress.sql |
        sql --set=table="$table" --set=embedded="$embedded_rows" --set=interval="$interval_seconds")
    if [[ -z $with_bar || -t 1 ]]; then echo; fi
    if ((rows == 0 || embedded < rows)); then fail "$embedded of $rows rows of $table have embeddings after $milliseconds ms"; fi
}

search() {
    local query=$1 mode=$2 condition=${3:-}
    sql --set=query="$query" --set=mode="$mode" --set=condition="$condition" < search.sql
}

headline "autoembed: starting the image as the container $container"
start
address=$(docker port "$container" 5432/tcp | head -n 1)
echo "Ready after $SECONDS s. A lane runs inside the server: a job of pg_cron that embeds"
echo "what waits in the queue, with a local model. No key and no network are needed."

headline "1. A table that keeps its own embeddings"
run_file documents.sql
echo "Six paragraphs go in. The INSERT returns at once, without waiting for the model:"
show "INSERT INTO documents (title, content) VALUES (...)
RETURNING id, title, embedding;"
embed documents '(SELECT count(embedding) FROM documents)' 0.01 < documents_rows.sql
echo "$milliseconds ms later all have embeddings. The first time, the lane loads the model."
echo "A row that changes gets a new one:"
update="UPDATE documents
SET content = content || ' Without it, tables grow and transaction IDs run out.'
WHERE title = 'VACUUM'
RETURNING id, title, embedding;"
show "$update"
embed documents '(SELECT count(embedding) FROM documents)' 0.01 <<< "$update"
echo "$milliseconds ms later it has the embedding of the new text."

headline "2. What Postgres says of its own functions"
run_file functions.sql
show "INSERT INTO functions ...  -- from pg_proc and pg_description"
embed functions '(SELECT count(DISTINCT id) FROM functions_embeddings)' 0.5 with_bar < functions_rows.sql
echo
echo "$rows rows embedded in $((milliseconds / 1000)).$((milliseconds / 100 % 10)) s by one lane."
echo
echo "${bold}By meaning:${reset} take a nap (these words are in none of the texts)"
search 'take a nap' vector
echo "${bold}By meaning and by words:${reset} jsonb keys"
search 'jsonb keys' hybrid
echo "${bold}With a filter:${reset} space on disk, condition => \$\$arguments = 'regclass'\$\$"
search 'space on disk' vector "arguments = 'regclass'"

headline "3. A passage of a long text"
run_file manual.sql
sql --output=/dev/null <<< "SELECT autoembed.wait_until_fresh('manuals');"
echo "The text is cut at its headings, and each chunk has an embedding:"
run "SELECT chunk_number, similarity::numeric(3, 2), chunk
FROM autoembed.search('manuals', 'undo a mistake', max_rows => 1);"

headline "4. A row that the provider refuses"
run_file poison.sql
sql > /dev/null 2>&1 <<< "SELECT autoembed.wait_until_fresh('tickets');"
echo "The others went through. The failed list has the reason:"
run "SELECT key, reason FROM autoembed.failed;"
echo "When the cause is gone, one call brings the row back:"
heal="SELECT autoembed.alter_model('strict', options => '{}');
SELECT autoembed.retry_failed('tickets');"
show "$heal"
sql --output=/dev/null <<< "$heal"
run "SELECT autoembed.wait_until_fresh('tickets');"

headline "5. How it goes"
run "SELECT table_name, state, embedded, waiting, failed, percent_done
FROM autoembed.status;"
echo "doctor() checks extensions, lanes, models, triggers, indexes and the queue:"
run "SELECT count(*) AS checks, count(*) FILTER (WHERE ok) AS passed
FROM autoembed.doctor();"

headline "What to try next"
echo "The container stays up. Connect:"
echo "    docker exec -it $container psql -U postgres"
echo "    psql postgresql://postgres:$password@$address/postgres"
echo "Then, for example:"
echo "    SELECT (hit).name FROM autoembed.search(NULL::functions, 'your words');"
echo "    SELECT autoembed.enable('your_table', content_columns => '{your_column}');"
echo "    SELECT * FROM autoembed.status \\watch 1"
echo "Read on in README.md and docs/. Remove it all:"
echo "    docker rm --force --volumes $container"
