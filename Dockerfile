# A command of this project on TPU hosts (scripts/launch_gke.sh); arguments: the module and its flags.
FROM python:3.11-slim
WORKDIR /app
# The requirements alone first: they change less often than the code.
COPY pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir '.[tpu]' && pip uninstall --yes openimages-detection
COPY common common
COPY configs configs
COPY detection detection
COPY ensemble ensemble
COPY scripts scripts
COPY segmentation segmentation
# PID 1 gets the cluster's TERM: the command stops with its state saved.
ENTRYPOINT ["python", "-m"]
