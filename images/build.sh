#!/bin/sh
# Builds an image with the builder that there is: docker, podman or buildah.
#
#     images/build.sh cpu|cuda|vllm|compiler|dynamo [TAG]     TAG is coldframe:cpu, ... where none is given
#
# BUILDER names the program, BUILDER_FLAGS more of its flags, PIP_CONF a pip.conf that says where
# packages are (torch's build for the CPU is not on PyPI), BASE another base image.
set -eu

kind=${1:?usage: images/build.sh cpu|cuda|vllm|compiler|dynamo [TAG]}
tag=${2:-coldframe:$kind}
here=$(cd "$(dirname "$0")" && pwd)
file=$here/$kind.Dockerfile
test -r "$file" || { echo "build.sh: there is no $file" >&2; exit 2; }

if test -z "${BUILDER:-}"; then
    for BUILDER in docker podman buildah none; do
        # A client without its engine is none.
        "$BUILDER" info >/dev/null 2>&1 && break
    done
fi
test "$BUILDER" != none || {
    echo "build.sh: neither docker nor podman nor buildah works here; name one in BUILDER" >&2
    exit 1
}

set -- -f "$file" -t "$tag"
test -z "${BASE:-}" || set -- "$@" --build-arg "BASE=$BASE"
test -z "${PIP_CONF:-}" || set -- "$@" --secret "id=pip,src=$PIP_CONF"
case $BUILDER in
docker) set -- build "$@" ;;
*) set -- build --format docker "$@" ;;
esac
# shellcheck disable=SC2086 # several flags
DOCKER_BUILDKIT=1 exec $BUILDER ${BUILDER_GLOBALS:-} "$@" ${BUILDER_FLAGS:-} "$here/.."
