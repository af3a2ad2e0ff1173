# coldframe with vLLM on NVIDIA GPUs: native workers answer first, vLLM takes decode over. Built from
# the repository's root: images/build.sh vllm, docs/images.md.
#
# As cuda.Dockerfile, with vLLM and its needs as layers between torch and this project. Versions of
# what both need are vLLM's to say here.
ARG PYTHON=3.11
ARG BASE=python:3.11-slim-trixie@sha256:9534e5a8e315485d4061ed659af0fd78a284c015f9b73661b41d6bab25604534

FROM ${BASE} AS tools
ARG PYTHON
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN "python${PYTHON}" -m venv /opt/coldframe
COPY images/install.sh images/split-nvidia.sh /build/

FROM tools AS torch
ARG TORCH=2.13.0
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh torch "torch==${TORCH}"

# pip takes what lies on PYTHONPATH for installed, and so leaves torch where it is.
FROM torch AS vllm
ARG PYTHON
ARG VLLM=0.32.0
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PYTHONPATH="/layers/torch/lib/python${PYTHON}/site-packages" \
    /build/install.sh vllm "vllm==${VLLM}" \
    && mkdir -p "/layers/engine/lib/python${PYTHON}/site-packages" \
    && mv "/layers/vllm/lib/python${PYTHON}/site-packages/vllm" \
        "/layers/engine/lib/python${PYTHON}/site-packages/"

FROM vllm AS wheels
ARG PYTHON
COPY constraints.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    PYTHONPATH="/layers/torch/lib/python${PYTHON}/site-packages:/layers/vllm/lib/python${PYTHON}/site-packages" \
    /build/install.sh wheels -c /build/constraints.txt awscrt boto3 cuda-bindings lz4 xxhash \
    && /build/split-nvidia.sh

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
# As in cpu.Dockerfile; and a C compiler, with which Triton makes what starts each of its kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends criu tini gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && PYTHONHASHSEED=0 "python${PYTHON}" -m compileall -q -f -j 0 --invalidation-mode unchecked-hash \
        -x '/(site-packages|dist-packages|test|tests)/' \
        "$("python${PYTHON}" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && "python${PYTHON}" -m venv --without-pip /opt/coldframe \
    && groupadd --gid 65532 coldframe \
    && useradd --uid 65532 --gid 65532 --no-log-init --no-create-home --home-dir /tmp \
        --shell /usr/sbin/nologin coldframe \
    && install -d /var/lib/coldframe/snapshots
COPY --from=wheels /layers/cudnn/ /opt/coldframe/
COPY --from=wheels /layers/nvidia/ /opt/coldframe/
COPY --from=wheels /layers/triton/ /opt/coldframe/
COPY --from=wheels /layers/torch/ /opt/coldframe/
COPY --from=wheels /layers/vllm/ /opt/coldframe/
COPY --from=wheels /layers/engine/ /opt/coldframe/
COPY --from=wheels /layers/wheels/ /opt/coldframe/
COPY --from=code /layers/code/ /opt/coldframe/
ENV PATH=/opt/coldframe/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    COLDFRAME_SNAPSHOT_STORE=/var/lib/coldframe/snapshots \
    COLDFRAME_DECODE=native,vllm \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
WORKDIR /
EXPOSE 8000
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/opt/coldframe/bin/coldframe"]
CMD ["serve"]
