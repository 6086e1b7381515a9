# fdl-bidsapp as a container image; docs/hpc.md says how to run it with Apptainer and Slurm.
#
#   docker build --tag fdl-bidsapp:0.1.0 .
#   docker build --tag fdl-bidsapp:0.1.0-cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker build --tag fdl-bidsapp:test --target test . && docker run --rm fdl-bidsapp:test
#
#   docker run --rm --user "$(id -u):$(id -g)" --read-only --tmpfs /tmp --network none \
#       --volume /data/study:/data/study:ro --volume /data/out:/data/out \
#       fdl-bidsapp:0.1.0 /data/study /data/out participant
#
# Any image with Python 3.11 to 3.13, as `python` and with venv, can take the place of BASE.

ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
# For a mirror of PyPI; or for a folder of wheels that is mounted into the build (buildah and
# podman: --volume), from which it is then made without any network.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
# PyTorch's own index has builds for the CPU alone. Those on PyPI are for CUDA, bring NVIDIA's
# libraries along, and make the image several times as large.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/fdl-bidsapp
ENV PATH=/opt/fdl-bidsapp/bin:$PATH
COPY constraints.txt ./
# Without what it depends on, which that index may not have in the versions of constraints.txt.
RUN pip install --no-cache-dir --no-deps --constraint constraints.txt \
    --index-url "${TORCH_INDEX}" torch
COPY pyproject.toml LICENSE README.md ./
COPY fdl_bidsapp fdl_bidsapp
COPY workflows workflows
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
    && pip install --no-cache-dir --constraint constraints.txt /dist/*.whl
# An image that lacks the model, or cannot load what it was built with, is not to be made.
RUN fdl models check default

# Runs the tests on the installed package when it is run, not when it is built.
FROM build AS test
RUN pip install --no-cache-dir --constraint constraints.txt 'fdl-bidsapp[dev]'
WORKDIR /test
COPY pyproject.toml ./
COPY tests tests
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
# The packaging tests are about the repository, of which this image has a part.
ENTRYPOINT ["pytest", "-p", "no:cacheprovider", "--ignore=tests/packaging"]
CMD ["tests"]

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fdl-bidsapp" \
      org.opencontainers.image.description="BIDS App: deep grey nuclei of midbrain and cerebellum in QSM, R2*, magnitude and SWI" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/fdl-bidsapp /opt/fdl-bidsapp
# Login shells, which some runners use, set a PATH of their own; /usr/local/bin stays on it.
RUN ln -s /opt/fdl-bidsapp/bin/fdl /opt/fdl-bidsapp/bin/fdl-bidsapp /usr/local/bin/
# The user may be any, with no entry in /etc/passwd and no home; /tmp alone need be writable
# (Apptainer sets HOME itself).
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 1000:1000
ENTRYPOINT ["fdl-bidsapp"]
