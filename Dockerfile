# Serves a model on CPUs: docker build -t treeflash . && docker run -p 8000:8000 treeflash
FROM python:3.12-slim

WORKDIR /src
COPY . .
# pyproject.toml has the versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[cuda,serve]' \
    && useradd --create-home --uid 1000 treeflash \
    && install --directory --owner 1000 /home/treeflash/.cache

USER 1000
WORKDIR /home/treeflash
# Fetched models: docker run -v treeflash:/home/treeflash/.cache ...
VOLUME /home/treeflash/.cache
EXPOSE 8000
ENTRYPOINT ["treeflash"]
CMD ["serve", "--host", "0.0.0.0"]
