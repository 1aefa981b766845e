#!/usr/bin/env bash
# Makes Debian packages for one major out of what Dockerfile.postgres has laid out in its stage `scripts`.
# Usage, in that stage: deb.sh TARGET
set -euo pipefail
target=$1
source=$(dirname "$0")/..
version=$(sed -n "s/^default_version = '\(.*\)'/\1/p" /scripts/autoembed.control)
pgmq=$(sed -n "s/^default_version = '\(.*\)'/\1/p" "/out/usr/share/postgresql/$PG_MAJOR/extension/pgmq.control")
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$(python3 -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')
extensions=usr/share/postgresql/$PG_MAJOR/extension

# Packs the tree $1, with the licence of $2; the fields of the control file that differ come from standard input.
pack() {
    local name=$1 licence=$2 tree
    tree=$(mktemp -d)
    cp -a "/tree/$name/." "$tree"
    install -D --mode=644 "$licence" "$tree/usr/share/doc/$name/copyright"
    mkdir "$tree/DEBIAN"
    {
        printf '%s\n' "Package: $name" "Maintainer: autoembed" "Section: database" "Priority: optional"
        cat
    } > "$tree/DEBIAN/control"
    chmod -R u=rwX,go=rX "$tree"
    dpkg-deb --root-owner-group -Zzstd --build "$tree" "$target" >&2
}

mkdir -p "$target"
main=postgresql-$PG_MAJOR-autoembed
queue=postgresql-$PG_MAJOR-pgmq
model=autoembed-all-minilm-l6-v2
mkdir -p "/tree/$main/$extensions" "/tree/$queue/$extensions" "/tree/$model/usr/local"
cp /scripts/* "/tree/$main/$extensions"
cp "/out/$extensions"/* "/tree/$queue/$extensions"
cp -a /out/usr/local/. "/tree/$model/usr/local"

pack "$main" "$source/LICENSE" << END
Version: $version
Architecture: all
Depends: postgresql-$PG_MAJOR, postgresql-plpython3-$PG_MAJOR, postgresql-$PG_MAJOR-pgvector, $queue, python3-requests, python3-numpy, python3-orjson
Recommends: postgresql-$PG_MAJOR-cron
Suggests: $model
Description: embeddings that keep in step with rows, for PostgreSQL $PG_MAJOR
 Attach a table, and each row has an embedding that follows its text. Lanes,
 which are jobs of pg_cron, send texts to a provider or run a local model.
END
pack "$queue" /wheels/pgmq-*.dist-info/METADATA << END
Version: $pgmq-0autoembed
Architecture: all
Depends: postgresql-$PG_MAJOR
Description: message queue on tables, for PostgreSQL $PG_MAJOR
 The SQL script of pgmq as its wheel on PyPI has it.
END
pack "$model" "/out/usr/local/share/autoembed/models/all-MiniLM-L6-v2/NOTICE" << END
Version: $version
Architecture: $(dpkg --print-architecture)
Depends: python3 (>= $python), python3 (<< $next), python3-numpy, libc6, libstdc++6
Description: local model of autoembed: all-MiniLM-L6-v2
 The model, with onnxruntime and tokenizers, which Debian does not have in these
 versions. They lie in /usr/local/lib/autoembed, for autoembed alone.
END
