"""What ``compat/huggingface_hub.py`` needs of huggingface_hub and datasets."""

import datasets
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from support.contracts import contract

from emloc_core.compat.huggingface_hub import offline


@contract("huggingface_hub", "huggingface_hub.offline")
def test_no_request_is_made_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline():
        try:
            HfApi().dataset_info("nobody/nothing")
        except OfflineModeIsEnabled:
            pass
        except Exception as error:
            raise AssertionError(f"constants.HF_HUB_OFFLINE does not stop requests ({type(error).__name__})") from error
    assert not constants.HF_HUB_OFFLINE


@contract("datasets", "huggingface_hub.offline")
def test_datasets_reads_its_cache_alone_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with offline(), pytest.raises(ConnectionError) as told:
        datasets.load_dataset("nobody/nothing", cache_dir=str(tmp_path))
    assert "ffline" in str(told.value), f"config.HF_HUB_OFFLINE is not read ({told.value})"
    assert not datasets.config.HF_HUB_OFFLINE
