# An image with snapshots of warm workers in it: a layer more, of some 30 MB a model. The context is a
# store that `coldframe snapshot create` has made in that very image (docs/images.md).
ARG IMAGE=coldframe:cpu

# A store is its user's own; here it is root's, for whoever the container runs as to read.
# hadolint ignore=DL3006
FROM ${IMAGE} AS store
# hadolint ignore=DL3002
USER 0:0
COPY . /store/
RUN chmod -R u=rwX,go=rX /store

# hadolint ignore=DL3006
FROM ${IMAGE}
COPY --from=store --chown=0:0 /store/ /var/lib/coldframe/snapshots/
