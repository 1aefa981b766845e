#!/usr/bin/env bash
# Prints the name of the image to build on, for one major of PostgreSQL: the official one, or where no registry gives it,
# a stand-in from Debian's archive. Usage: base.sh MAJOR.
set -euo pipefail
cd "$(dirname "$0")"

major=${1:?the major of PostgreSQL}
suite=$(awk -v major="$major" '$1 == major { print $2 }' majors)
if [[ -z $suite ]]; then
    echo "PostgreSQL $major is not among the majors of docker/majors: $(awk '/^[0-9]/ { print $1 }' majors | xargs)." >&2
    exit 1
fi
official=postgres:$major-trixie
standin=autoembed-base:$major-$suite
root=autoembed-base:rootfs-$major

# The official images have had another volume since PostgreSQL 18.
volume=/var/lib/postgresql
data=$volume/$major/docker
if ((major < 18)); then
    volume=/var/lib/postgresql/data
    data=$volume
fi

# The machine's own certificate authorities go into the stand-in, so that pip works during the build. The image has them
# no more: Dockerfile.postgres removes their folder.
shopt -s nullglob
trusted=/usr/local/share/ca-certificates/build
authorities=(/usr/local/share/ca-certificates/*.crt)
hooks=()
if ((${#authorities[@]})); then hooks=(--customize-hook="mkdir \"\$1/$trusted\""); fi
for authority in "${authorities[@]}"; do hooks+=(--customize-hook="copy-in $authority $trusted"); done
recipe=$(cat base.sh standin/* "${authorities[@]}" | sha256sum | cut -d ' ' -f 1)

is_here() { docker image inspect "$1" > /dev/null 2>&1; }

build_standin() {
    # setsid, because mmdebstrap ends its whole process group when it fails.
    # shellcheck disable=SC2016 # mmdebstrap's own shell expands $1, the root filesystem.
    setsid --wait mmdebstrap --quiet --variant=minbase \
        --include="ca-certificates,gosu,less,libnss-wrapper,locales,postgresql-$major" \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --essential-hook='mkdir "$1/etc/postgresql-common"' \
        --essential-hook='echo "create_main_cluster = false" > "$1/etc/postgresql-common/createcluster.conf"' \
        "${hooks[@]}" "$suite" | docker import - "$root"
    docker build --quiet --label "autoembed=$recipe" --tag "$standin" --build-arg ROOT="$root" \
        --build-arg PG_MAJOR="$major" --build-arg PGDATA="$data" --build-arg VOLUME="$volume" standin
}

if is_here "$official"; then
    echo "$official"
elif [[ $(docker image inspect --format '{{.Config.Labels.autoembed}}' "$standin" 2> /dev/null) == "$recipe" ]]; then
    echo "$standin"
# An engine gives up an unreachable registry by itself; the limit is for one that stalls.
elif refusal=$(timeout 600 docker pull --quiet "$official" 2>&1 > /dev/null); then
    echo "$official"
else
    echo "docker pull $official: ${refusal:-no answer in time}" >&2
    if ! command -v mmdebstrap > /dev/null; then
        if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
            echo "There is no base image: make 'docker pull $official' work, or name another image in BASE_IMAGE." >&2
            exit 1
        fi
        echo "Installing mmdebstrap from Debian" >&2
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y mmdebstrap > /dev/null
    fi
    echo "Building a stand-in base from Debian's archive, about a minute" >&2
    build_standin >&2
    echo "$standin"
fi
