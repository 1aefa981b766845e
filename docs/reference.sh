#!/usr/bin/env bash
# Writes docs/reference.md out of the COMMENTs of the extension in an image: docs/reference.sh IMAGE
set -euo pipefail
cd "$(dirname "$0")"

container=$(docker run --detach --pull=never --env POSTGRES_PASSWORD=reference --env AUTOEMBED_LANES=0 "$1")
trap 'docker rm --force --volumes "$container" > /dev/null' EXIT
# During its first start the server listens on the socket only.
for ((tenths = 0; tenths < 600; tenths++)); do
    if docker exec "$container" pg_isready --quiet --host=127.0.0.1; then break; fi
    sleep 0.1
done
docker exec --interactive "$container" psql --username=postgres --no-psqlrc --quiet --set=ON_ERROR_STOP=1 \
    < reference.sql > reference.md
