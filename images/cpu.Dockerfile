# coldframe on a CPU. Built from the repository's root: images/build.sh cpu, docs/images.md.
#
# Each of the first stages makes one layer under /layers, the last one lays them over each other in
# the order of how rarely they change: system, torch, other packages, this project.
ARG PYTHON=3.11
ARG BASE=python:3.11-slim-trixie@sha256:9534e5a8e315485d4061ed659af0fd78a284c015f9b73661b41d6bab25604534

FROM ${BASE} AS tools
ARG PYTHON
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN "python${PYTHON}" -m venv /opt/coldframe
COPY images/install.sh /build/

# The secret `pip` is a pip.conf that says where packages are, torch's build for the CPU among them.
# That one is asked for by its whole name: PyPI's torch of this version is the one for CUDA.
FROM tools AS torch
ARG TORCH=2.13.0+cpu
COPY images/torch.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh torch --no-deps -r /build/torch.txt "torch==${TORCH}"

FROM tools AS wheels
COPY images/wheels.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh wheels --no-deps -r /build/wheels.txt

FROM tools AS code
COPY pyproject.toml README.md LICENSE /src/
COPY loader /src/loader
COPY snapshot /src/snapshot
COPY runtime /src/runtime
COPY benchmarks /src/benchmarks
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh code --no-deps /src

FROM ${BASE} AS runtime
ARG PYTHON
# CRIU is the distribution's, and so is PID 1, which reaps what its children leave behind. Their
# versions are those of the release: security fixes come with each build.
# The base image has no byte code of Python's own library: without it each process of each start would
# compile what it imports of that, and could keep none of it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends criu tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && PYTHONHASHSEED=0 "python${PYTHON}" -m compileall -q -f -j 0 --invalidation-mode unchecked-hash \
        -x '/(site-packages|dist-packages|test|tests)/' \
        "$("python${PYTHON}" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && "python${PYTHON}" -m venv --without-pip /opt/coldframe \
    && groupadd --gid 65532 coldframe \
    && useradd --uid 65532 --gid 65532 --no-log-init --no-create-home --home-dir /tmp \
        --shell /usr/sbin/nologin coldframe \
    && install -d /var/lib/coldframe/snapshots
COPY --from=torch /layers/torch/ /opt/coldframe/
COPY --from=wheels /layers/wheels/ /opt/coldframe/
COPY --from=code /layers/code/ /opt/coldframe/
ENV PATH=/opt/coldframe/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    COLDFRAME_SNAPSHOT_STORE=/var/lib/coldframe/snapshots
# By number, so that a platform that allows no root sees that it is none.
USER 65532:65532
WORKDIR /
EXPOSE 8000
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/opt/coldframe/bin/coldframe"]
CMD ["serve"]
