# The images of DeeCap: targets `front` (no torch in it), `worker-cpu` and `worker-gpu`.
# The front is last, so that `docker build .` without a target makes the smallest one.
ARG PYTHON=3.12.13-slim-bookworm

# Where packages are installed. None of the stages before `runtime` is in an image.
FROM python:${PYTHON} AS packages
ENV PATH=/opt/venv/bin:${PATH} PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/venv
WORKDIR /src
# Of the project only what names its packages: a change of code leaves the layers below, torch's among them, as they are.
COPY pyproject.toml README.md LICENSE NOTICE deploy/constraints.txt ./

FROM packages AS packages-front
RUN --mount=type=cache,target=/var/cache/pip pip install . && pip uninstall --yes deecap

# torch alone comes from the index of PyTorch's CPU builds: PyPI's own has gigabytes of CUDA with it.
FROM packages AS packages-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --index-url "${TORCH_CPU_INDEX}" "$(grep -o 'torch==[0-9.]*' pyproject.toml)" \
    && pip install '.[cpu]' && pip uninstall --yes deecap

# CUDA comes with the wheels, once, for both: torch of this index and onnxruntime-gpu from 1.31 on are built for CUDA 13.
# The base image of NVIDIA would bring a second copy.
FROM packages AS packages-gpu
ARG TORCH_GPU_INDEX=https://download.pytorch.org/whl/cu130
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --index-url "${TORCH_GPU_INDEX}" "$(grep -o 'torch==[0-9.]*' pyproject.toml)" \
    && pip install '.[gpu]' 'onnxruntime-gpu[cuda,cudnn]>=1.31' && pip uninstall --yes deecap

FROM packages AS code
COPY model model
COPY service service
RUN pip install --no-deps --target /opt/deecap .

# What the images have in common. A number and no name, so that Kubernetes can see that it is not root.
FROM python:${PYTHON} AS runtime
ENV PATH=/opt/venv/bin:/opt/deecap/bin:${PATH} PYTHONPATH=/opt/deecap PYTHONUNBUFFERED=1 \
    DEECAP_HOST=0.0.0.0 DEECAP_LOG_FORMAT=json
WORKDIR /tmp
USER 10001:10001

FROM runtime AS worker-cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=code /opt/deecap /opt/deecap
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8001/readyz', timeout=4)"]
CMD ["deecap", "worker"]

FROM runtime AS worker-gpu
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=code /opt/deecap /opt/deecap
# Where ONNX Runtime finds the CUDA of the wheels, and what NVIDIA's container runtime hands in of the driver. A worker
# without a GPU would be a slow surprise: it refuses to start.
ENV LD_LIBRARY_PATH=/opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib:/opt/venv/lib/python3.12/site-packages/nvidia/cudnn/lib \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility DEECAP_DEVICE=cuda
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8001/readyz', timeout=4)"]
CMD ["deecap", "worker"]

FROM runtime AS front
COPY --from=packages-front /opt/venv /opt/venv
COPY --from=code /opt/deecap /opt/deecap
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["deecap", "serve"]
