#!/usr/bin/env bash
# Builds the image of a major of PostgreSQL with one line a stage; what the tools print goes into build/demo.log.
# Usage: build.sh MAJOR
set -euo pipefail
cd "$(dirname "$0")/.."

major=${1:?the major of PostgreSQL}
log=build/demo.log base=''
mkdir -p build
: > "$log"

stage() {
    local start=$SECONDS
    printf '%-50s' "$1 ..."
    shift
    if "$@" >> "$log" 2>&1; then
        printf '%4d s\n' "$((SECONDS - start))"
    else
        printf ' failed\n\n'
        tail -n 15 "$log" >&2
        echo "All of it is in $log." >&2
        exit 1
    fi
}
find_base() { base=${BASE_IMAGE:-$(docker/base.sh "$major")}; }

stage "Docker engine" docker/engine.sh
stage "Image of PostgreSQL $major to build on" find_base
stage "Image autoembed (minutes the first time)" make --no-print-directory image PG="$major" BASE_IMAGE="$base"
