#!/bin/sh
# Installs CRIU 4 from Debian 13 into a folder of its own, on a Debian or Ubuntu whose own is too old.
#
#     install-criu.sh DIR        then run DIR/bin/criu
#
# Nothing outside DIR changes: the packages are unpacked, not installed, and CRIU runs with the
# loader and the libraries that came with it. Wants apt and dpkg, no root. The packages are checked
# by apt against Debian's keys.
set -eu

dir=${1:?usage: install-criu.sh DIR}
release=trixie

# 4.1 or later, as snapshot/criu.py wants it.
have=$(criu --version 2>/dev/null | sed -n 's/^Version: \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
# shellcheck disable=SC2086 # two numbers
set -- $have
if test "${1:-0}" -gt 4 || { test "${1:-0}" -eq 4 && test "${2:-0}" -ge 1; }; then
    echo "install-criu: this system's own CRIU $1.$2 will do"
    exit 0
fi

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "install-criu: this needs Debian's apt and dpkg; install CRIU 4.1 or later yourself and" >&2
    echo "install-criu: name it in COLDFRAME_CRIU" >&2
    exit 1
fi

packages="criu libcompel1 libc6 libnftables1 libnftnl11 libxtables12 libjansson4 libnl-3-200 libnet1
libprotobuf-c1 libuuid1 libgnutls30t64 libnettle8t64 libhogweed6t64 libbsd0 libmd0 libp11-kit0
libidn2-0 libunistring5 libtasn1-6 libgmp10 libmnl0 libffi8"

# The mirror that this system has its own packages from, where that is Debian's.
mirror=
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    test -z "$mirror" && test -r "$file" || continue
    mirror=$(grep -ohE 'https?://[^ ]+/debian/?( |$)' "$file" | head -n 1 | tr -d ' ')
done
mirror=${mirror:-http://deb.debian.org/debian}

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
work=$dir/work
rm -rf "$work" "$dir/root.new"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$dir/root.new"
if ! test -r "$keyring"; then
    # Ubuntu has Debian's keys in a package of its own.
    (cd "$work" && apt-get download -qq debian-archive-keyring)
    dpkg -x "$work"/debian-archive-keyring_*.deb "$work/keyring"
    keyring=$work/keyring$keyring
fi

cat >"$work/$release.sources" <<END
Types: deb
URIs: $mirror
Suites: $release
Components: main
Signed-By: $keyring
END

# Downloads go on as whoever runs this: apt's own user may not write here.
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$work/$release.sources" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="" "$@"
}

apt update
set --
for name in $packages; do
    set -- "$@" "$name/$release"
done
(cd "$work/debs" && apt download "$@")
for deb in "$work"/debs/*.deb; do
    dpkg -x "$deb" "$dir/root.new"
done

rm -rf "$dir/root" && mv "$dir/root.new" "$dir/root"
cd "$dir"
loader=$(find root/usr/lib* -name 'ld-linux-*.so.*' | sort | head -n 1)
libraries=$(dirname "$(ls root/usr/lib/*/libcompel.so.1)")
mkdir -p bin
# By its own place: the folder may be carried elsewhere, to another machine.
cat >bin/criu.new <<END
#!/bin/sh
here=\$0
test ! -L "\$here" || here=\$(readlink -f "\$here")
here=\${here%/*}/..
exec "\$here/$loader" --library-path "\$here/$libraries" "\$here/root/usr/sbin/criu" "\$@"
END
chmod 755 "$dir/bin/criu.new"
"$dir/bin/criu.new" --version >/dev/null
mv "$dir/bin/criu.new" "$dir/bin/criu"
rm -rf "$work"
"$dir/bin/criu" --version | head -n 1
