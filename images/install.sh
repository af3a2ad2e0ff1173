#!/bin/sh
# One layer of an image: packages into a folder of their own, without what nothing reads at run
# time, byte-compiled.
#
#     install.sh LAYER PIP-ARGUMENTS...        makes /layers/LAYER, to be laid over /opt/coldframe
#
# torch's headers, which a compiler of decode steps wants, go to /layers/headers.
set -eu

layer=/layers/${1:?usage: install.sh LAYER PIP-ARGUMENTS...}
shift
python=/opt/coldframe/bin/python

"$python" -m pip install --quiet --no-compile --no-warn-script-location --prefix="$layer" "$@"
site=$(echo "$layer"/lib/python3*/site-packages)

if test -d "$site/torch"; then
    rm -rf "$site/torch/test" "$site/torch/share"
    # import torch looks for this one file there, all others are tests and compilers of protocols.
    find "$site/torch/bin" -type f ! -name torch_shm_manager -delete
    find "$site/torch/bin" -mindepth 1 -type d -empty -delete
    headers=/layers/headers${site#"$layer"}/torch
    mkdir -p "$headers"
    mv "$site/torch/include" "$headers/"
fi
for package in sympy mpmath networkx psutil; do
    test ! -d "$site/$package" || find "$site/$package" -type d -name tests -prune -exec rm -rf {} +
done
if test -d "$site/botocore/data"; then
    # Of AWS's services those that weights, images and credentials come from.
    for service in "$site"/botocore/data/*/; do
        case $(basename "$service") in
        s3 | sts | sso | sso-oidc | signin) ;;
        *) rm -rf "$service" ;;
        esac
    done
fi
rm -rf "$layer/share"
find "$layer" -type f \( -name '*.a' -o -name '*.pyi' \) -delete
# Of programs only ours is ever called.
test ! -d "$layer/bin" || find "$layer/bin" -type f ! -name coldframe -delete

# Nobody changes these files, so that Python need not look at the sources' times and sizes: a
# puller that fetches what is read fetches no source.
PYTHONHASHSEED=0 "$python" -m compileall -q -j 0 --invalidation-mode unchecked-hash \
    -s "$layer" -p /opt/coldframe "$site" || echo "install.sh: not all is compiled" >&2

# The same files make the same layer: nothing in it tells when it was built.
find "$layer" -exec touch -h -d @0 {} +
