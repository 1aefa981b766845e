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
        psql --username=postgres --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --pset=null=NULL --pset=footer=off "$@"
}

# Shows the SQL of a file without its comments, or the statement itself, and runs it.
run_file() {
    show "$(grep -v '^--' "$1")"
    sql < "$1"
}
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
    # As in compose.yaml: Docker's 64 MB of shared memory are too few for a parallel index build.
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
    local width=30 filled rate left='' full rest
    filled=$((width * $1 / $2))
    rate=$((1000 * $1 / ($3 + 1)))
    if ((rate)); then left="$((($2 - $1) / rate)) s left"; fi
    printf -v full '%*s' "$filled" ''
    printf -v rest '%*s' "$((width - filled))" ''
    printf '%s%s%s%s %5d / %d rows  %4d rows/s  %s\n' \
        "$green" "${full// /#}" "$reset" "${rest// /.}" "$1" "$2" "$rate" "$left"
}

# Runs the SQL of stdin, then polls the table until all its rows have embeddings; sets rows and milliseconds.
embed() {
    local table=$1 interval_seconds=$2 with_bar=${3:-} line embedded=0 tenth=-1
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
    done < <(cat - progress.sql | sql --set=table="$table" --set=interval="$interval_seconds")
    if [[ -z $with_bar || -t 1 ]]; then echo; fi
    if ((rows == 0 || embedded < rows)); then fail "$embedded of $rows rows of $table have embeddings after $milliseconds ms"; fi
}

headline "autoembed: starting the image as the container $container"
start
address=$(docker port "$container" 5432/tcp | head -n 1)
echo "Ready after $SECONDS s. Lanes run inside the server: pg_cron jobs that embed what waits in the queue."

headline "1. A table that keeps its own embeddings"
run_file documents.sql
echo "Six paragraphs go in. The INSERT returns at once, so their embeddings are still NULL:"
show "INSERT INTO documents (title, content) VALUES (...) RETURNING id, title, embedding;"
embed documents 0.01 < documents_rows.sql
echo "$milliseconds ms later the lane has filled them (the first time it loads the model, all-MiniLM-L6-v2):"
run "SELECT id, title, left(embedding::text, 40) || '...' AS embedding FROM documents ORDER BY id;"

echo "A row that changes loses its embedding in the same statement, for it no longer fits:"
update="UPDATE documents
SET content = content || ' Without it, tables grow and transaction IDs run out.'
WHERE title = 'VACUUM'
RETURNING id, title, embedding;"
show "$update"
embed documents 0.01 <<< "$update"
echo "$milliseconds ms later it has the embedding of the new text:"
run "SELECT id, title, left(embedding::text, 40) || '...' AS embedding FROM documents WHERE title = 'VACUUM';"

echo "Search by meaning: the words of the question need not stand in the text."
run "SELECT title, round((1 - (embedding <=> autoembed.embed('undo a mistake')))::numeric, 2) AS similarity
FROM documents
ORDER BY embedding <=> autoembed.embed('undo a mistake')
LIMIT 3;"

headline "2. What Postgres says of its own functions"
run_file functions.sql
show "$(grep -v '^--' functions_rows.sql)"
embed functions 0.5 with_bar < functions_rows.sql
echo
echo "$rows rows embedded in $((milliseconds / 1000)).$((milliseconds / 100 % 10)) s by one lane. After a bulk load comes the index:"
run "CREATE INDEX ON functions USING hnsw (embedding halfvec_cosine_ops);"
echo "A search embeds the question inside SQL, and uses that index:"
run "EXPLAIN (COSTS OFF) SELECT name FROM functions ORDER BY embedding <=> autoembed.embed('take a nap') LIMIT 5;"
echo "Three such searches, with the answers ranked by cosine similarity (hnsw.ef_search = 200, as many rows are alike):"
echo
for query in 'cut a string into pieces' 'capital letters' 'take a nap'; do
    echo "$bold\"$query\"$reset"
    sql --set=query="$query" < search.sql
done

headline "3. How it goes"
run "SELECT table_name, state, embedded, waiting, failed, rows_per_second, percent_done FROM autoembed.status;"
run "SELECT subject, ok, finding FROM autoembed.doctor();"

headline "The container stays up"
echo "Connect:  docker exec -it $container psql -U postgres"
echo "     or:  psql postgresql://postgres:$password@$address/postgres"
echo "Remove:   docker rm --force --volumes $container"
