#!/bin/sh
# Bring the tracking server's tables to the version of the MLflow that is installed here, then end. Run by one process
# before any server starts (service `migrate` of compose.yaml): servers that make tables at once kill each other.
# MLFLOW_BACKEND_STORE_URI names the database, PGPASSWORD opens it.
set -eu
: "${MLFLOW_BACKEND_STORE_URI:?names the database, without a password}"
mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
exec python -m mlflow.server.auth db upgrade --url "$MLFLOW_BACKEND_STORE_URI"
