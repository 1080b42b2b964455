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

# What must be installed, as two lists: while these stay, no change of pyproject.toml installs anything anew.
FROM base AS needed
COPY pyproject.toml /tmp/
RUN cd /tmp && python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*p["dependencies"], sep="\n", file=open("node.txt", "w")); \
    extras = p["optional-dependencies"]; \
    print(*extras["server"], *extras["otel"], sep="\n", file=open("server.txt", "w"))'

FROM base AS node-libraries
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=needed /tmp/node.txt /opt/odmoe-needed/
COPY constraints.txt /opt/odmoe-needed/
RUN python3 -m venv /opt/odmoe \
 && pip install --no-cache-dir --disable-pip-version-check -qq -c /opt/odmoe-needed/constraints.txt \
    -r /opt/odmoe-needed/node.txt ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}

FROM node-libraries AS server-libraries
COPY --from=needed /tmp/server.txt /opt/odmoe-needed/
RUN pip install --no-cache-dir --disable-pip-version-check -qq -c /opt/odmoe-needed/constraints.txt \
    -r /opt/odmoe-needed/server.txt

# The code comes last, as a wheel: some seconds and some hundred kilobytes to each image.
FROM base AS wheel
RUN python3 -m venv /opt/odmoe
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --disable-pip-version-check -qq --no-deps -w /wheel .

FROM node-libraries AS node
COPY --from=wheel /wheel /opt/odmoe-wheel
RUN pip install --no-cache-dir --disable-pip-version-check -qq --no-deps /opt/odmoe-wheel/*.whl
USER 10001:10001
WORKDIR /home/odmoe
STOPSIGNAL SIGTERM
ENTRYPOINT ["odmoe-node"]

FROM node AS predictor
ENTRYPOINT ["odmoe-predictor"]

FROM server-libraries AS server
COPY --from=wheel /wheel /opt/odmoe-wheel
RUN pip install --no-cache-dir --disable-pip-version-check -qq --no-deps /opt/odmoe-wheel/*.whl
USER 10001:10001
WORKDIR /home/odmoe
STOPSIGNAL SIGTERM
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
  CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["odmoe", "server"]
