#!/bin/sh
# Takes NVIDIA's libraries, and Triton where it is, out of torch's layer, into layers of their own: they
# are most of its bytes, and stay when torch changes.
#
#     split-nvidia.sh [LAYERS]        /layers, where install.sh has made torch's
set -eu

layers=${1:-/layers}
torch=$(echo "$layers"/torch/lib/python3*/site-packages)
inside=${torch#"$layers/torch"}

move() { # LAYER PATH, which there may be none of
    test -e "$torch/$2" || return 0
    there=$layers/$1$inside/$2
    mkdir -p "$(dirname "$there")"
    mv "$torch/$2" "$there"
}

move cudnn nvidia/cudnn
move nvidia nvidia
move triton triton

# Folders that something has been moved from or to would tell when.
find "$layers" -exec touch -h -d @0 {} +
