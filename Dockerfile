# One node: torch's wheels bring CUDA, the host brings the driver. Not built by CI.
#
#   docker build -t radio-distill .
#   docker run --gpus all --shm-size 16g -v "$PWD":/work radio-distill doctor
#   docker run --gpus all --shm-size 16g -v "$PWD":/work --entrypoint torchrun radio-distill \
#     --nproc-per-node 8 -m stages.cli train mine.yaml
FROM python:3.12-slim
# Triton compiles its kernels with a C compiler when they are first called.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /opt/radio_distill
RUN pip install --no-cache-dir '/opt/radio_distill[export,hf]'
WORKDIR /work
ENTRYPOINT ["radio-distill"]
