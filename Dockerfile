# The base must be glibc, as the driver's libraries are that the NVIDIA runtime mounts: no Alpine. To pin it,
# give its digest, which `docker buildx imagetools inspect python:3.13-slim-bookworm` tells:
#   docker build --build-arg PYTHON_IMAGE=python:3.13-slim-bookworm@sha256:... -t vram-manager .
ARG PYTHON_IMAGE=python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Neither environment has a pip of its own: the base's installs into them.
RUN python3 -m venv --without-pip /opt/vram-manager && python3 -m venv --without-pip /opt/hatchling
COPY requirements.lock deploy/build.lock ./
RUN python3 -m pip --python /opt/vram-manager/bin/python install --no-compile --require-hashes --only-binary=:all: -r requirements.lock \
    && python3 -m pip --python /opt/hatchling/bin/python install --require-hashes --only-binary=:all: -r build.lock
COPY pyproject.toml README.md ./
COPY vram_manager ./vram_manager
RUN /opt/hatchling/bin/python -m hatchling build -t wheel -d wheel \
    && python3 -m pip --python /opt/vram-manager/bin/python install --no-compile --no-deps --no-index wheel/*.whl
# Nothing that never runs (nvidia-ml-py drops an example.py at the top, zstandard has a second backend of 12 MB), and
# bytecode that is never checked against a time stamp: equal sources give equal files.
RUN cd /opt/vram-manager/lib/python3*/site-packages \
    && find . -depth \( -type d \( -name test -o -name tests \) -o -name '*.c' -o -name '*.pyx' -o -name '*.pyi' \) -exec rm -rf {} + \
    && rm -f example.py zstandard/*cffi* \
    && python3 -m compileall -q --invalidation-mode unchecked-hash .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="vram-manager" \
      org.opencontainers.image.description="Arbitrates the GPU between Ollama and ComfyUI: watches, frees, and proves that the memory came back." \
      org.opencontainers.image.licenses="MIT"
# Worker threads share what memory they are done with, and what is free at its end goes back: some 3 MiB less.
ENV PATH=/opt/vram-manager/bin:$PATH \
    MALLOC_ARENA_MAX=2 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=utility
# A new named volume takes over owner and mode of the directory it is mounted on, so these must exist. Workers
# without root reach the socket (mode 0660) through group 65532.
RUN groupadd --gid 65532 vram-manager \
    && useradd --uid 65532 --gid 65532 --no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin vram-manager \
    && install -d -o 65532 -g 65532 -m 0755 /run/vram-manager /var/lib/vram-manager
COPY --from=build /opt/vram-manager /opt/vram-manager
# The official images ship the standard library without bytecode, and a read-only root never gets any: each health
# check would compile what it imports anew. So importing our parts once leaves it here.
RUN PYTHONDONTWRITEBYTECODE= python -c "import vram_manager.cli, vram_manager.client, vram_manager.daemon, vram_manager.doctor, vram_manager.record.run, vram_manager.report, vram_manager.top"
USER 65532:65532
VOLUME ["/run/vram-manager", "/var/lib/vram-manager"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s --retries=3 CMD ["vram-manager", "health"]
# No init in front: as the first process the daemon ends with status 75 when the container lost its GPU device, and
# `restart: unless-stopped` brings it back with the device.
ENTRYPOINT ["vram-manager"]
CMD ["run"]
