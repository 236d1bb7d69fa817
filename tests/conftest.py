"""What every test gets: no network, no window, no settings of the caller's shell; GPU tests only with a GPU."""

import os

# Before transformers, datasets or matplotlib are imported: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg")
for _name in ("BLOCKFFN_MODEL", "BLOCKFFN_JOURNEY_MODEL", "BLOCKFFN_OUTPUT_DIR", "BLOCKFFN_QUICK"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch  # takes seconds, so only when it decides something

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
