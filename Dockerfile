# mmlavit with CUDA, at the versions of constraints.txt: docker build -t mmlavit .
#
# Then, with the NVIDIA Container Toolkit:
#   docker run --gpus all --shm-size 8g -v $PWD:/work mmlavit train CONFIG
#
# No image has been built from this yet: where it was written there is no Docker daemon and no GPU.
# The lines of pip, without CUDA, are those of README.md, which `make test-install` runs.

# The CUDA that PyPI's torch is built with, with the compiler that mmcv's operators need.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1

WORKDIR /opt/mmlavit
COPY constraints.txt .
RUN pip install -c constraints.txt torch setuptools wheel packaging ninja opencv-python

# There is no GPU while an image is built, so mmcv is told which ones it will meet.
ARG TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;9.0+PTX"
RUN FORCE_CUDA=1 pip install -c constraints.txt --no-build-isolation onedl-mmcv

COPY . .
RUN pip install -c constraints.txt --no-build-isolation -e '.[onedl]' \
    && python -c 'import cv2, mmcv.ops, mmdet.apis, mmseg.apis, mmpretrain.apis, mmlavit'

WORKDIR /work
ENTRYPOINT ["mmlavit"]
