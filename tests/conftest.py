import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; two threads each would wait for one another

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def flex_without_a_compiler(monkeypatch):
    """FlexAttention's semantics without code generation, which takes half a minute and a C++ compiler."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations.flex_attention import WrappedFlexAttention

    torch.compiler.reset()  # shapes of other tests count towards a limit
    compiled = torch.compile(flex_attention, backend="aot_eager")
    def uncompiled(*args, _compile, **kwargs):
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: compiled)
