# coldframe with vLLM on NVIDIA GPUs: native workers answer first, vLLM takes decode over. Built from
# the repository's root: images/build.sh vllm, docs/images.md.
#
# As cuda.Dockerfile, with vLLM and its needs as layers between torch and this project. Versions of
# what both need are vLLM's to say here: images/pins.py writes them down.
ARG PYTHON=3.11
ARG BASE=python:3.11-slim-trixie@sha256:9534e5a8e315485d4061ed659af0fd78a284c015f9b73661b41d6bab25604534

FROM ${BASE} AS tools
ARG PYTHON
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN "python${PYTHON}" -m venv /opt/coldframe
COPY images/install.sh images/split-nvidia.sh /build/

# As in cuda.Dockerfile, so that a node with both images has the layers once; and Triton.
FROM tools AS torch
ARG TORCH=2.13.0
COPY images/torch.txt images/nvidia.txt images/triton.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh torch --no-deps -r /build/torch.txt -r /build/nvidia.txt \
        -r /build/triton.txt "torch==${TORCH}" \
    && /build/split-nvidia.sh

FROM tools AS vllm
COPY images/vllm.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh vllm --no-deps -r /build/vllm.txt

FROM tools AS engine
ARG VLLM=0.32.0
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh engine --no-deps "vllm==${VLLM}"

FROM tools AS wheels
COPY images/wheels-vllm.txt /build/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /build/install.sh wheels --no-deps -r /build/wheels-vllm.txt

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
COPY --from=torch /layers/cudnn/ /opt/coldframe/
COPY --from=torch /layers/nvidia/ /opt/coldframe/
COPY --from=torch /layers/triton/ /opt/coldframe/
COPY --from=torch /layers/torch/ /opt/coldframe/
COPY --from=vllm /layers/vllm/ /opt/coldframe/
COPY --from=engine /layers/engine/ /opt/coldframe/
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
