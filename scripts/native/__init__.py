"""Kafka, MinIO and vLLM as plain processes of this machine, for people and tests without a container engine."""
