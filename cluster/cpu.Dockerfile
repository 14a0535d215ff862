# llmray for nodes without a GPU. From the folder above:
#   docker build -f cluster/cpu.Dockerfile -t YOUR_REGISTRY/llmray:cpu \
#       --build-arg TORCH_INDEX=ADDRESS_OF_TORCHS_CPU_BUILDS .
# Without TORCH_INDEX torch's usual build is installed, which also computes on the CPU but is larger.
FROM python:3.11-slim

# wget: KubeRay's probes. git: packages and models that are named by a repository.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget git \
    && rm -rf /var/lib/apt/lists/*

# torch first and alone, so that nothing later asks for another build of it
ARG TORCH_INDEX
WORKDIR /opt/llmray
COPY constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} \
    "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY llmray llmray
RUN pip install --no-cache-dir -c constraints.txt ".[cluster]"

# not root: code from a model or a data set must not own the container
RUN useradd --create-home --uid 1000 llmray && mkdir /shared && chown llmray /shared
USER llmray
WORKDIR /home/llmray

ENV LLMRAY_HOME=/shared/llmray
CMD ["llmray", "--help"]
