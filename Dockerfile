# One file, three images: node, predictor, server. The first two have no web framework.
#
#   docker build --target node .        (or predictor, or server)
#
# BASE_IMAGE needs python3 (3.11 or newer) with venv. TORCH_INDEX is an extra package index for torch; give it nothing
# to get PyPI's build with CUDA.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
RUN groupadd --gid 10001 odmoe && useradd --uid 10001 --gid 10001 --create-home odmoe
ENV PATH=/opt/odmoe/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM base AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY pyproject.toml constraints.txt ./
# The dependencies first: this layer is used again until they change.
RUN python3 -m venv /opt/odmoe \
 && python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > needed.txt \
 && pip install --no-cache-dir --disable-pip-version-check -qq -c constraints.txt -r needed.txt \
    ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check -qq --no-deps .

FROM base AS node
COPY --from=build /opt/odmoe /opt/odmoe
USER 10001:10001
WORKDIR /home/odmoe
STOPSIGNAL SIGTERM
ENTRYPOINT ["odmoe-node"]

FROM node AS predictor
ENTRYPOINT ["odmoe-predictor"]

FROM node AS server
USER root
COPY pyproject.toml constraints.txt /tmp/
RUN cd /tmp \
 && python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["server"], sep="\n")' \
    > needed.txt \
 && pip install --no-cache-dir --disable-pip-version-check -qq -c constraints.txt -r needed.txt \
 && rm /tmp/*
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["odmoe", "server"]
