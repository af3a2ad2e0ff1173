# coldframe as a worker of NVIDIA Dynamo's: one of our images, and Dynamo's runtime as a layer more.
#
#     images/build.sh dynamo                                                    on coldframe:cpu
#     BUILDER_FLAGS="--build-arg IMAGE=coldframe:cuda" images/build.sh dynamo
ARG IMAGE=coldframe:cpu
ARG PYTHON=3.11
ARG BASE=python:3.11-slim-trixie@sha256:9534e5a8e315485d4061ed659af0fd78a284c015f9b73661b41d6bab25604534

FROM ${BASE} AS dynamo
ARG PYTHON
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN "python${PYTHON}" -m venv /opt/coldframe
COPY images/install.sh images/dynamo.txt /build/
# Its own word is that pydantic should be older than ours, with which it imports as well.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh dynamo --no-deps -r /build/dynamo.txt

# hadolint ignore=DL3006
FROM ${IMAGE}
COPY --from=dynamo /layers/dynamo/ /opt/coldframe/
CMD ["worker", "--dynamo"]
