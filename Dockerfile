# Two images: `docker build --target serving .` answers requests and has no torch; `--target training` makes bundles.
#
#   docker run --read-only --cap-drop ALL --tmpfs /tmp -v BUNDLE:/bundle:ro -v STATE:/state -p 50051:50051 \
#     -e PENCHANT_TOKEN_FILE=... -e PENCHANT_TLS_CERTIFICATE=... -e PENCHANT_TLS_KEY=... IMAGE
#
# The service refuses an address beyond the machine without TLS and token; PENCHANT_INSECURE=true allows it.

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /source
COPY pyproject.toml constraints.txt LICENSE README.md ./

# Dependencies first, from the metadata alone, so that a change of code does not install them again.
FROM base AS serving-packages
RUN for name in penchant features training serving benchmarks; do mkdir $name && touch $name/__init__.py; done \
    && pip install -c constraints.txt '.[cpu]'
COPY penchant penchant
COPY features features
COPY training training
COPY serving serving
COPY benchmarks benchmarks
RUN pip install --no-deps --force-reinstall .

FROM serving-packages AS training-packages
RUN pip install -c constraints.txt '.[cpu,training]'

FROM python:3.11-slim AS image
# Compiled kernels are cached where a read-only image can write; without a /tmp each process compiles its own.
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE NUMBA_CACHE_DIR=/tmp/numba ORT_DISABLE_TELEMETRY=1
RUN useradd --uid 10001 --create-home penchant && install -d -o penchant /state /data
USER penchant

FROM image AS training
COPY --from=training-packages /venv /venv
WORKDIR /data
ENTRYPOINT ["penchant"]
CMD ["--help"]

FROM image AS serving
COPY --from=serving-packages /venv /venv
ENV PENCHANT_LISTEN=0.0.0.0:50051 PENCHANT_HEALTH_LISTEN=0.0.0.0:8080 PENCHANT_STATE_DIR=/state
EXPOSE 50051 8080
VOLUME /state
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-m", "penchant.health"]
ENTRYPOINT ["penchant"]
CMD ["serve", "/bundle"]
