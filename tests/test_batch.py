"""Batch work in both deployments, before a real engine, and what is particular to keys, files and the command line."""

from __future__ import annotations

import pytest

from schemas.settings import Settings
from tests.batch_case import BatchCase
from tests.conftest import KafkaService, MinioService, distributed


class TestEmbedded(BatchCase):
    """Through the embedded log."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory) -> Settings:
        return Settings(data=tmp_path_factory.mktemp("batch"))


class TestKafka(BatchCase):
    """Through a topic for each model."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory, kafka: KafkaService, minio: MinioService) -> Settings:
        return distributed(tmp_path_factory.mktemp("batch"), kafka, minio)
