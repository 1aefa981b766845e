#!/usr/bin/env bash
# Puts a package of pgvector into /packages: the archive's, or where that one has known faults, one built from source.
set -euo pipefail

# autoembed.doctor() names the faults of older versions.
oldest=0.8.4
version=0.8.6
sha1=6ad8f9d7a6da16ca72f0035cd1685ee9e88598e5
sha256=25c9b78cfdaa43c66788d7490246ac24e4fe1c86f19c4b60c089b723f84a4a0d
package=postgresql-$PG_MAJOR-pgvector

mkdir /packages /source
cd /packages
if dpkg --compare-versions "$(apt-cache show --no-all-versions "$package" | awk '/^Version:/ { print $2 }')" ge "$oldest"
then
    apt-get download "$package"
    exit
fi

apt-get install -y --no-install-recommends ca-certificates curl gcc make "postgresql-server-dev-$PG_MAJOR"
# The archive drops a version soon after the next one. Its snapshots keep all.
# shellcheck disable=SC2016 # apt-get expands it.
archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | sed -n 1p)
for url in "${archive}pool/main/p/pgvector/pgvector_$version.orig.tar.gz" \
    "https://snapshot.debian.org/file/$sha1"; do
    if curl --fail --silent --show-error --location --output /source.tar.gz "$url"; then break; fi
done
echo "$sha256 /source.tar.gz" | sha256sum --check --quiet
tar --extract --gzip --strip-components=1 --directory=/source --file=/source.tar.gz
# Without OPTFLAGS the code runs on any processor of the architecture. Without bitcode it takes no clang.
make --directory=/source --jobs="$(nproc)" OPTFLAGS= with_llvm=no
make --directory=/source install DESTDIR=/built OPTFLAGS= with_llvm=no
rm -r /built/usr/include
strip --strip-unneeded "/built$(pg_config --pkglibdir)/vector.so"
install -D --mode=644 /source/LICENSE "/built/usr/share/doc/$package/copyright"
mkdir /built/DEBIAN
cat > /built/DEBIAN/control << END
Package: $package
Version: $version-0autoembed
Architecture: $(dpkg --print-architecture)
Depends: libc6, postgresql-$PG_MAJOR
Maintainer: autoembed
Section: database
Homepage: https://github.com/pgvector/pgvector
Description: vectors and their indexes in PostgreSQL $PG_MAJOR
END
dpkg-deb --root-owner-group --build /built /packages
