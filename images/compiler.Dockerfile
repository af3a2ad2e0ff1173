# What makes snapshots with compiled decode steps: our image for a CPU with a C++ compiler and torch's
# headers in it. What it makes runs in the image without them (docs/images.md).
#
#     BUILDER_FLAGS="--target torch" images/build.sh cpu coldframe:torch
#     images/build.sh compiler
ARG IMAGE=coldframe:cpu
ARG TORCH=coldframe:torch

# hadolint ignore=DL3006
FROM ${TORCH} AS torch

# hadolint ignore=DL3006
FROM ${IMAGE}
USER 0:0
# A clone maps the libraries of the image that it runs in, and they have to be those that it was frozen
# with. So none is exchanged for a newer one here: where the compiler wants one, this fails, and the
# image below is to be built anew, on a base of today's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-mark hold libc6 libgcc-s1 libstdc++6 \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
COPY --from=torch /layers/headers/ /opt/coldframe/
USER 65532:65532
