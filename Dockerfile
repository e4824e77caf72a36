# An image with CUDA and everything that a training needs:
#
#   docker build --tag vlsi-fast .
#   docker run --gpus all --shm-size 16g --volume /data:/data --volume "$PWD/runs:/opt/vlsi-fast/runs" vlsi-fast \
#     deepspeed vlsi_fast/train.py --stage all --config configs/qwen2vl_72b_to_7b.yaml --data.root /data
#
# --shm-size: data workers hand batches over in shared memory, of which Docker gives 64 MiB. 16 GiB is enough for 8 GPUs
# with 8 workers each, 2 batches ahead, of 100 MB: 12.8 GB.
# CUDA 13.0: what torch 2.13 on PyPI is built with. DeepSpeed compiles its parts with this nvcc and wants the same.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 DS_BUILD_OPS=0
# devel, not runtime: DeepSpeed and Triton compile at first use. git: a stage records the commit of the code.
RUN apt-get update && apt-get install --yes --no-install-recommends \
      python3 python3-dev python3-venv build-essential git openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/vlsi-fast
COPY . .
RUN pip install --upgrade pip "setuptools>=69" wheel \
    && pip install --constraint constraints.txt torch \
    && pip install --constraint constraints.txt --no-build-isolation --editable ".[deepspeed,demo,liger]"
CMD ["vlsi-fast", "--help"]
