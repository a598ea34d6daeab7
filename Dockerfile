# osv_jax for NVIDIA GPUs: their driver is the host's, CUDA and cuDNN come with JAX.
#
#   docker build -t osv_jax .
#   docker run --gpus=all -v "$PWD:/work" osv_jax osv-train --config=stage1 --workdir=runs/stage1 ...
#   docker run --gpus=all -p 127.0.0.1:7860:7860 -v "$PWD:/work" osv_jax osv-serve --host=0.0.0.0 --weights=weights/svd ...
# The Python that constraints.txt was made with.
FROM python:3.11-slim

COPY . /osv_jax
RUN pip install --no-cache-dir --constraint /osv_jax/constraints.txt 'jax[cuda13]' '/osv_jax[convert,gcs,text,web]'
# As in launch/gpu_host.sh.
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
WORKDIR /work
