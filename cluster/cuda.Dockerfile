# llmray for nodes with NVIDIA GPUs. The wheels of torch bring CUDA along; the machine needs the driver
# and the NVIDIA container toolkit. From the folder above:
#   docker build -f cluster/cuda.Dockerfile -t YOUR_REGISTRY/llmray:cuda .
FROM python:3.11-slim

# wget: KubeRay's probes. git: packages and models that are named by a repository.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget git \
    && rm -rf /var/lib/apt/lists/*

# torch first and alone, so that nothing later asks for another build of it
WORKDIR /opt/llmray
COPY constraints.txt ./
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY llmray llmray
RUN pip install --no-cache-dir -c constraints.txt ".[cluster]"

# not root: code from a model or a data set must not own the container
RUN useradd --create-home --uid 1000 llmray && mkdir /shared && chown llmray /shared
USER llmray
WORKDIR /home/llmray

ENV LLMRAY_HOME=/shared/llmray
# which devices and which parts of the driver the container toolkit hands in
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["llmray", "--help"]
