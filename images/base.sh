#!/bin/sh
# The images' base where no registry is reached: Debian trixie with Python 3.11, from Debian's own
# packages, as a tar file. It stands in for python:3.11-slim-trixie; pass it on as BASE.
#
#     images/base.sh FILE.tar        then: buildah add, or docker import
#
# Wants root, mmdebstrap, apt and Debian's keys. Packages come from the mirror that this machine's apt
# is set to, where that is one of Debian's. Trixie itself has no Python 3.11: its packages are those of
# bookworm, which run with trixie's libraries.
set -eu

target=${1:?usage: images/base.sh FILE.tar}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt's own user reads and writes here.
chmod 755 "$work"

uri_of() { # NAME of an archive
    apt-get indextargets --format "\$(REPO_URI)" "Created-By: Packages" | grep -E "/$1/?\$" | head -n 1
}
mirror=$(uri_of debian)
if test -z "$mirror"; then
    apt-get -qq update
    mirror=$(uri_of debian)
fi
test -n "$mirror" || { echo "base.sh: apt knows no mirror of Debian's" >&2; exit 1; }
security=$(uri_of debian-security)
security=${security:-${mirror%/}-security}

# How this machine reaches it: proxies, certificates, whatever is set.
apt-config dump --no-empty --format '%f "%v";%n' Acquire | grep -v '^Acquire::\(Languages\|IndexTargets\|GzipIndexes\)' >"$work/acquire" || true

packages="python3.11 python3.11-minimal python3.11-venv libpython3.11-stdlib libpython3.11-minimal"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs"
for suite in bookworm bookworm-security; do
    case $suite in *-security) uri=$security ;; *) uri=$mirror ;; esac
    echo "deb [signed-by=$keyring] $uri $suite main"
done >"$work/bookworm.list"
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$work/bookworm.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="" "$@"
}
apt update
# shellcheck disable=SC2086 # several packages
(cd "$work/debs" && apt download $packages)

# ensurepip's package asks for a distutils that nothing here imports, so it is unpacked, not installed.
export inside='
    mkdir /tmp/unpacked && mv /tmp/debs/python3.11-venv_*.deb /tmp/unpacked/ &&
    apt-get install -y -qq --no-install-recommends python3-pip-whl python3-setuptools-whl /tmp/debs/*.deb &&
    dpkg-deb -x /tmp/unpacked/*.deb / && rm -rf /tmp/debs /tmp/unpacked'

# shellcheck disable=SC2016 # the hook's own shell expands what is in it
mmdebstrap --quiet --mode=root --variant=minbase --format=tar --keyring="$keyring" \
    --include=ca-certificates,netbase,tzdata \
    --aptopt="$work/acquire" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
    --customize-hook="copy-in $work/debs /tmp" \
    --customize-hook='chroot "$1" sh -c "$inside"' \
    trixie "$target" \
    "deb [signed-by=$keyring] $mirror trixie main" \
    "deb [signed-by=$keyring] $mirror trixie-updates main" \
    "deb [signed-by=$keyring] $security trixie-security main"
