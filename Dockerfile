# tokentape itself: gateway, API, indexer and scheduler are this image with another command.
FROM python:3.12-slim AS build
WORKDIR /src
COPY locks/boot.txt locks/core.txt locks/
RUN python -m pip install --no-cache-dir --require-hashes -r locks/boot.txt \
    && python -m venv --without-pip /opt/tokentape \
    && uv pip sync --no-cache --python /opt/tokentape/bin/python --require-hashes locks/core.txt
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY store store
COPY ingest ingest
COPY replay replay
COPY lifecycle lifecycle
COPY tokentape tokentape
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && uv pip install --no-cache --python /opt/tokentape/bin/python --no-deps /wheels/*.whl

FROM python:3.12-slim
# The data directory belongs to the user that runs the parts; a named volume inherits that.
RUN useradd --system --uid 10001 --home-dir /data tokentape && install -d -o tokentape -g tokentape -m 0700 /data
COPY --from=build /opt/tokentape /opt/tokentape
ENV PATH=/opt/tokentape/bin:$PATH PYTHONUNBUFFERED=1 TOKENTAPE_DATA=/data
USER tokentape
WORKDIR /data
VOLUME /data
EXPOSE 8400 8401
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokentape"]
CMD ["up"]
