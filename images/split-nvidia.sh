#!/bin/sh
# Takes NVIDIA's libraries and Triton out of torch's layer, into layers of their own: they are most
# of its bytes, and stay when torch changes. Folders that there are none of stay empty.
set -eu

torch=$(echo /layers/torch/lib/python3*/site-packages)
inside=${torch#/layers/torch}

move() { # LAYER PATH...
    layer=/layers/$1$inside
    shift
    mkdir -p "$layer"
    for path in "$@"; do
        test -e "$torch/$path" || continue
        mkdir -p "$layer/$(dirname "$path")"
        mv "$torch/$path" "$layer/$path"
    done
}

move cudnn nvidia/cudnn
move nvidia nvidia
move triton triton
