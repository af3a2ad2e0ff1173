# An image with snapshots of warm workers in it: a layer more, of some 30 MB a model. The context is a
# store that `coldframe snapshot create` has made in that very image (docs/images.md).
ARG IMAGE=coldframe:cpu
# hadolint ignore=DL3006
FROM ${IMAGE}
COPY --chown=0:0 . /var/lib/coldframe/snapshots/
